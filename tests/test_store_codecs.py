"""Codecs against plain formulas: error bounds, stated sizes, and values that a dtype cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from predistill.store import (
    ConfigError,
    DataError,
    FieldSpec,
    Plan,
    ShardPlan,
    StoreWriter,
    TeacherStore,
    bytes_per_row,
)
from predistill.store.codecs import codec_of, parts_of

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=300),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def roundtrip(values: np.ndarray, spec: FieldSpec) -> np.ndarray:
    return codec_of(spec).decode(codec_of(spec).encode(values, spec), spec)


@given(FLOATS)
def test_int8_is_within_half_a_level_of_its_block(values: np.ndarray) -> None:
    got = roundtrip(values, FieldSpec("h", (values.shape[1],), "float32", codec="int8"))
    for first in range(0, values.shape[1], 128):
        block = slice(first, first + 128)
        bound = np.abs(values[:, block]).max(axis=1, keepdims=True).astype(np.float64) * (1 / 254 + 2.0**-22)
        assert (np.abs(got[:, block].astype(np.float64) - values[:, block]) <= bound + 1.5e-36).all(), (
            "a block below 1.5e-36 is zero"
        )


@given(FLOATS)
@example(np.array([[-9000.0, -10000.0]], np.float32))  # in the middle of two levels, and float32 rounds the level too
def test_uint8_is_within_half_a_level_of_its_position(values: np.ndarray) -> None:
    values = -np.abs(values)
    got = roundtrip(values, FieldSpec("z", (values.shape[1],), "float32", codec="uint8"))
    bound = np.abs(values).max(axis=1, keepdims=True).astype(np.float64) * (1 / 510 + 2.0**-22)
    assert (np.abs(got.astype(np.float64) - values) <= bound + 3e-36).all()
    assert (got[values == 0] == 0).all()


@given(FLOATS)
def test_bfloat16_is_what_torch_rounds_to(values: np.ndarray) -> None:
    got = roundtrip(values, FieldSpec("h", (values.shape[1],), "bfloat16"))
    assert (got == torch.from_numpy(values).bfloat16().float().numpy()).all()


@given(bits=st.integers(1, 32), data=st.data())
def test_bitpack_is_exact_at_the_stated_size(bits: int, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=70))
    values = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 2**bits - 1)))
    spec = FieldSpec("ids", (shape[1],), "int64", codec="bitpack", parameters={"bits": bits})
    (packed,) = codec_of(spec).encode(values, spec)
    assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    assert (codec_of(spec).decode((packed,), spec) == values).all()


@pytest.mark.parametrize(
    ("codec", "dtype", "per_value"),
    [
        ("dense", "float32", 4),
        ("dense", "float16", 2),
        ("dense", "bfloat16", 2),
        ("int8", "float32", 1 + 4 / 128),
        ("uint8", "float32", 1 + 4 / 1280),
    ],
)
def test_a_value_costs_what_is_stated(tmp_path: Path, codec: str, dtype: str, per_value: float) -> None:
    spec = FieldSpec("teacher_hidden_states_01", (1280,), dtype, codec=codec)
    assert sum(part.entry_bytes for part in parts_of(spec)) == 1280 * per_value
    store = _one_field(tmp_path / "s", spec, -np.ones((1000, 1280), np.float32))
    size = (tmp_path / "s/shards/train-00000.arrow").stat().st_size
    assert size == pytest.approx(1000 * bytes_per_row([spec], {}), rel=0.01)
    assert np.abs(store.select()[[0]]["teacher_hidden_states_01"] + 1).max() < 1e-6


def _one_field(path: Path, spec: FieldSpec, values: np.ndarray) -> TeacherStore:
    with StoreWriter.begin(path, Plan("t", {}, {}, [spec], [ShardPlan("train", 0, 100, 100 + len(values))])) as writer:
        builder = writer.open_shard(writer.missing()[0], len(values), {})
        builder.put(spec.name, np.arange(len(values)), values)
        builder.put_addresses(np.zeros((len(values), 16), np.uint8))
        writer.commit(builder)
        writer.finish()
    return TeacherStore.open(path)


@pytest.mark.parametrize(
    ("dtype", "codec", "value", "message"),
    [
        ("float16", "dense", 7e4, "70000 at source row 102 is more than float16 holds.*bfloat16 or float32"),
        ("float16", "dense", -7e4, "-70000 at source row 102.*float16"),
        ("float32", "int8", np.inf, "gave inf at source row 102"),
        ("bfloat16", "dense", np.nan, "gave nan at source row 102"),
        ("float32", "dense", np.nan, "teacher_x.*gave nan at source row 102"),
    ],
)
def test_what_a_dtype_cannot_hold_stops_the_dump(
    tmp_path: Path, dtype: str, codec: str, value: float, message: str
) -> None:
    values = np.zeros((5, 4), np.float32)
    values[2, 1] = value
    with pytest.raises(DataError, match=message):
        _one_field(tmp_path / "s", FieldSpec("teacher_x", (4,), dtype, codec=codec), values)
    assert not list((tmp_path / "s/shards").iterdir()), "nothing half-written"


def test_padding_may_hold_anything(tmp_path: Path) -> None:
    """NaN past a row's own length is never stored, so never refused."""
    spec = FieldSpec("teacher_attentions_00", (1, "S", "S"), "float16")
    values = np.full((1, 1, 3, 3), np.nan, np.float32)
    values[:, :, :2, :2] = 0.5
    fields = [FieldSpec("input_ids", ("S",), "int32", role="input"), spec]
    with StoreWriter.begin(tmp_path / "s", Plan("t", {}, {}, fields, [ShardPlan("train", 0, 0, 1)])) as writer:
        builder = writer.open_shard(writer.missing()[0], 1, {"S": np.array([2])})
        builder.put("input_ids", np.array([0]), np.array([[5, 6, 0]]))
        builder.put(spec.name, np.array([0]), values)
        with pytest.raises(DataError, match="gave nan at source row 0"):
            builder.put(spec.name, np.array([0]), np.full((1, 1, 3, 3), np.nan))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ("T",), "dtype": "float32"}, "one of S, P, K, \\*"),
        ({"shape": (0,), "dtype": "float32"}, "positive int"),
        ({"shape": ("S", "K"), "dtype": "float32"}, 'parameters\\["counts"\\]'),
        ({"shape": ("K",), "dtype": "float32", "parameters": {"counts": "n"}}, '"K" comes last'),
        ({"shape": (), "dtype": "float8"}, "dtype is one of"),
        ({"shape": (), "dtype": "float32", "role": "x"}, "role is one of"),
    ],
)
def test_fields_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FieldSpec("f", **arguments)  # type: ignore[arg-type]


def test_codecs_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="codec is one of dense, int8, uint8, bitpack, bytes, arrow; got 'zip'"):
        parts_of(FieldSpec("f", (3,), "float32", codec="zip"))
    with pytest.raises(ConfigError, match="int8 needs an axis"):
        parts_of(FieldSpec("f", (), "float32", codec="int8"))
    with pytest.raises(DataError, match="uint8 holds values up to 0; got 0.5"):
        roundtrip(np.array([[0.5, -1]]), FieldSpec("f", (2,), "float32", codec="uint8"))
    with pytest.raises(ConfigError, match="bits from 1 to 32; got 40"):
        parts_of(FieldSpec("f", (3,), "int64", codec="bitpack", parameters={"bits": 40}))
    spec = FieldSpec("f", (1,), "int64", codec="bitpack", parameters={"bits": 3})
    with pytest.raises(DataError, match="below 2\\*\\*3 fit; got 8 to 8"):
        codec_of(spec).encode(np.array([[8]]), spec)
