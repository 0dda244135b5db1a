"""Exports read by the libraries that their formats belong to, against the values that the store was made of."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import synthetic_store as synthetic
from click.testing import CliRunner
from predistill.cli import cli
from predistill.store import ConfigError, StoreCorrupt, TeacherStore
from predistill.store.convert.config import ExportConfig
from predistill.store.convert.export import export

RAGGED = {"teacher_kept_logits", "teacher_kept_indices", "teacher_samples"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("whole") / "store")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, so that every column is put together of pieces."""
    from predistill.store.convert import columns, export_parquet, export_safetensors, export_webdataset

    for module in (export_parquet, export_safetensors, export_webdataset):
        monkeypatch.setattr(module, "chunks", lambda mapped: columns.chunks(mapped, 5_000))


def exported(store: Path, output: Path, form: str, **more: Any) -> Path:
    said = export(ExportConfig(str(store), str(output), form, **more))
    assert [one["name"].split(".")[0] for one in said["files"]] == [
        "train-00000", "train-00001", "train-00002", "validation-00000"
    ]  # fmt: skip
    for one in said["files"]:
        data = (output / one["name"]).read_bytes()
        assert (one["bytes"], one["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert said["samples"] == 80
    return output


def rows_of(name: str) -> list[dict[str, Any]]:
    return synthetic.truth(next(shard for shard in synthetic.SHARDS if shard.name == name))[2]


def expected(row: dict[str, Any], spec: Any) -> Any:
    """The row's own value; of what has counts, the kept entries of every position."""
    if spec.name not in RAGGED:
        return row[spec.name]
    counts = row[spec.parameters["counts"]]
    return [list(values[:count]) for values, count in zip(row[spec.name], counts, strict=True)]


def close(spec: Any, found: Any, value: Any, kept: str = "") -> None:
    """Within what the codec keeps. kept: the field whose precision it has."""
    if spec.codec in ("bytes", "arrow"):
        assert found == value, spec.name
        return
    if spec.name in RAGGED:
        assert [len(one) for one in found] == [len(one) for one in value], spec.name
        found, value = (np.asarray([each for one in rows for each in one], float) for rows in (found, value))
    found, value = np.asarray(found, float), np.asarray(value, float)
    assert found.size == value.size and (not value.size or found.shape == value.shape), (spec.name, found.shape)
    peak = float(np.nan_to_num(np.abs(value)).max(initial=0))
    bound = synthetic.EXACT.get(kept or spec.name, 1e-6) * peak
    assert np.allclose(found.reshape(value.shape), value, rtol=0, atol=bound + 1e-12, equal_nan=True), spec.name


def test_parquet_holds_every_value(store: Path, tmp_path: Path) -> None:
    output = exported(store, tmp_path / "out", "parquet")
    for shard in synthetic.SHARDS:
        file = pq.ParquetFile(output / f"{shard.name}.parquet")
        assert file.num_row_groups > (shard.name == "train-00000")
        table = file.read().to_pylist()
        for at, (found, row) in enumerate(zip(table, rows_of(shard.name), strict=True)):
            assert found["source_index"] == shard.start + at and found["view"] == shard.view
            for spec in synthetic.FIELDS:
                value = expected(row, spec)
                close(spec, found[spec.name], value)
        described = json.loads(file.schema_arrow.metadata[b"predistill.fields"])
        assert [one["name"] for one in described] == [spec.name for spec in synthetic.FIELDS]
        assert file.schema_arrow.metadata[b"predistill.decoded"] == b"true"


def test_parquet_keeps_dtypes(store: Path, tmp_path: Path) -> None:
    found = pq.read_schema(exported(store, tmp_path / "out", "parquet") / "train-00000.parquet")
    assert found.field("teacher_logits").type == pa.list_(pa.float16(), 3)
    assert found.field("input_ids").type.value_type == pa.int32()
    assert found.field("teacher_hidden_states_06").type.value_type.value_type == pa.float32()
    assert found.field("teacher_feature_map").type.value_type.list_size == 3
    assert found.field("content_hash").type == pa.string()


def test_raw_parquet_is_the_shard(store: Path, tmp_path: Path) -> None:
    output = exported(store, tmp_path / "out", "parquet", raw=True)
    shard = pa.ipc.open_file(store / "shards" / "train-00001.arrow").get_batch(0)
    table = pq.read_table(output / "train-00001.parquet")
    for name in shard.schema.names:
        if name != "content_hash":
            assert repr(table[name].to_pylist()) == repr(shard.column(name).to_pylist()), name
    assert table["content_hash"].to_pylist() == [one.hex() for one in shard.column("content_hash").to_pylist()]


def test_datasets_reads_parquet(store: Path, tmp_path: Path) -> None:
    output = exported(store, tmp_path / "out", "parquet")
    data = {"train": str(output / "train-*.parquet"), "validation": str(output / "validation-*.parquet")}
    found = datasets.load_dataset("parquet", data_files=data, cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in found.items()} == {"train": 70, "validation": 10}
    assert found["train"][31]["source_index"] == 31
    close(synthetic.FIELDS[4], found["train"][31]["teacher_hidden_states_00"],
          rows_of("train-00001")[1]["teacher_hidden_states_00"])  # fmt: skip


def test_safetensors_hold_every_value(store: Path, tmp_path: Path) -> None:
    output = exported(store, tmp_path / "out", "safetensors")
    for shard in synthetic.SHARDS:
        with safetensors.safe_open(output / f"{shard.name}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            metadata = file.metadata()
        assert json.loads(metadata["predistill.fields"])[0]["name"] == "input_ids"
        assert tensors["source_index"].tolist() == list(range(shard.start, shard.stop))
        assert str(tensors["teacher_hidden_states_02"].dtype) == "torch.bfloat16"
        for at, row in enumerate(rows_of(shard.name)):
            for spec in synthetic.FIELDS:
                name = "meta.json" if spec.name == "meta" else spec.name
                found = tensors[name]
                if f"{name}.offsets" in tensors:
                    first, last = tensors[f"{name}.offsets"][at : at + 2].tolist()
                    found = found[first:last]
                else:
                    found = found[at]
                if spec.name == "meta":
                    assert json.loads(bytes(found.tolist())) == row["meta"]
                elif spec.codec == "bytes":
                    assert bytes(found.tolist()) == row[spec.name]
                elif spec.name in RAGGED:
                    flat = [each for one in expected(row, spec) for each in one]
                    close(dataclasses.replace(spec, name=f"{spec.name}, flat"), found.double(), flat, kept=spec.name)
                else:
                    value = np.asarray(row[spec.name])
                    close(spec, found.double().reshape(value.shape), value)


def test_raw_safetensors_have_parts(store: Path, tmp_path: Path) -> None:
    output = exported(store, tmp_path / "out", "safetensors", raw=True)
    shard = pa.ipc.open_file(store / "shards" / "train-00000.arrow").get_batch(0)
    with safetensors.safe_open(output / "train-00000.safetensors", framework="np") as file:
        levels, scales = (file.get_tensor(f"teacher_hidden_states_06.{part}") for part in ("values", "scales"))
        packed = file.get_tensor("teacher_kept_indices")
    stored = shard.column("teacher_hidden_states_06")
    assert np.array_equal(levels.reshape(-1), stored.field("values").flatten().flatten().to_numpy())
    assert np.array_equal(scales.reshape(-1), stored.field("scales").flatten().flatten().to_numpy())
    assert packed.dtype == np.uint8


def members(path: Path) -> dict[str, dict[str, bytes]]:
    """sample -> what follows the first dot -> bytes, in order."""
    made: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for one in tar:
            assert one.isfile() and (one.mtime, one.uid, one.gid, one.uname) == (0, 0, 0, "")
            key, _, name = one.name.partition(".")
            file = tar.extractfile(one)
            assert file
            made.setdefault(key, {})[name] = file.read()
    return made


def test_webdataset_holds_every_value(store: Path, tmp_path: Path) -> None:
    output = exported(store, tmp_path / "out", "webdataset")
    first = 0
    for shard in synthetic.SHARDS:
        found = members(output / f"{shard.name}.tar")
        rows = rows_of(shard.name)
        assert list(found) == [f"{shard.split}-{first + at:09d}" for at in range(len(rows))]
        for files, row in zip(found.values(), rows, strict=True):
            said = json.loads(files["json"])
            for spec in synthetic.FIELDS:
                value = expected(row, spec)
                if spec.codec == "bytes":
                    assert files.get(f"{spec.name}.bin", b"") == value
                elif spec.codec == "arrow":
                    assert said[spec.name] == value
                elif not spec.shape:
                    own = said[spec.name]
                    assert own is None if np.isnan(value) else own == pytest.approx(value)
                else:
                    array = np.load(io.BytesIO(files[f"{spec.name}.npy"]), allow_pickle=False)
                    if spec.name in RAGGED:
                        flat = [each for one in value for each in one]
                        close(dataclasses.replace(spec, name=f"{spec.name}, flat"), array, flat, kept=spec.name)
                    else:
                        close(spec, array, value)
        first += len(rows)


def with_images(path: Path, monkeypatch: pytest.MonkeyPatch, *images: bytes) -> Path:
    """A store whose rows have these files in turn."""
    truth = synthetic.truth

    def pictures(shard: Any) -> Any:
        lengths, stored, rows = truth(shard)
        for at, row in enumerate(rows):
            row["image"] = images[at % len(images)]
        return lengths, stored, rows

    monkeypatch.setattr(synthetic, "truth", pictures)
    return synthetic.write(path)


def test_datasets_reads_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which wants the same files of every sample."""
    output = exported(with_images(tmp_path / "store", monkeypatch, b"file"), tmp_path / "out", "webdataset")
    data = {"train": str(output / "train-00000.tar")}
    found = datasets.load_dataset("webdataset", data_files=data, cache_dir=str(tmp_path / "cache"))["train"]
    assert len(found) == 30 and found[7]["json"]["source_index"] == 7
    close(synthetic.FIELDS[3], found[7]["teacher_logits.npy"], rows_of("train-00000")[7]["teacher_logits"])


@pytest.mark.parametrize("form", ["parquet", "webdataset", "safetensors"])
def test_equal_stores_give_equal_files(store: Path, tmp_path: Path, form: str) -> None:
    one, two = (exported(store, tmp_path / name, form) for name in "ab")
    assert [path.read_bytes() for path in sorted(one.glob("*-*"))] == [
        path.read_bytes() for path in sorted(two.glob("*-*"))
    ]


def test_webdataset_names_images_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_images(tmp_path / "store", monkeypatch, b"\x89PNG\r\n", b"\xff\xd8\xff\xe0", b"")
    found = list(members(exported(path, tmp_path / "out", "webdataset") / "train-00000.tar").values())
    assert "image.png" in found[0] and "image.jpg" in found[1]
    assert not [name for name in found[2] if name.startswith("image")]


KILLER = """
import os, signal, sys
from predistill.store.convert import export as module
from predistill.store.convert.config import ExportConfig
left, real = [2], module._settle
def settle(*given):
    left[0] -= 1
    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
    real(*given)
module._settle = settle
module.export(ExportConfig(sys.argv[1], sys.argv[2], "safetensors"))
"""


def test_killed_it_goes_on(store: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLER, str(store), str(output)]).returncode == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert len(done) == 2
    exported(store, output, "safetensors")
    assert all((output / name).stat().st_mtime_ns == at for name, at in done.items())
    assert not list(output.glob("*.tmp"))


def test_other_exports_and_folders_are_refused(store: Path, tmp_path: Path) -> None:
    output = exported(store, tmp_path / "out", "parquet")
    with pytest.raises(ConfigError, match="of another --format"):
        export(ExportConfig(str(store), str(output), "webdataset"))
    with pytest.raises(ConfigError, match="with another --raw"):
        export(ExportConfig(str(store), str(output), "parquet", raw=True))
    with pytest.raises(ConfigError, match="of another store"):
        export(ExportConfig(str(synthetic.write(tmp_path / "other", more=1)), str(output), "parquet"))
    with pytest.raises(ConfigError, match="give a folder elsewhere"):
        export(ExportConfig(str(store), str(store / "out"), "parquet"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="holds notes and is no export"):
        export(ExportConfig(str(store), str(tmp_path / "mine"), "parquet"))
    (tmp_path / "mine" / "export.json").write_text("[]")
    with pytest.raises(StoreCorrupt, match="one JSON object expected"):
        export(ExportConfig(str(store), str(tmp_path / "mine"), "parquet"))
    with pytest.raises(ConfigError, match="--format is one of"):
        ExportConfig("store", "out", "csv")


def test_damage_is_not_exported(store: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(store, tmp_path / "bad"))
    path = bad / "shards" / "train-00001.arrow"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"row 3", b"row 4"))
    with pytest.raises(StoreCorrupt, match="train-00001.arrow is not what the dump wrote"):
        export(ExportConfig(str(bad), str(tmp_path / "out"), "parquet"))


def test_command(store: Path, tmp_path: Path) -> None:
    words = ["export", str(store), str(tmp_path / "out"), "--format", "parquet"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0 and "80" in done.stdout
    said = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert said["samples"] == 80 and said["format"] == "parquet"
    with TeacherStore.open(store) as opened:
        assert json.loads((tmp_path / "out" / "export.json").read_text())["fingerprint"] == opened.fingerprint


def test_names_of_a_stranger_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of a tar become paths where it is unpacked."""
    bad = [dataclasses.replace(spec, name="../../out") if spec.name == "teacher_loss" else spec
           for spec in synthetic.FIELDS]  # fmt: skip
    truth = synthetic.truth

    def named(shard: Any) -> Any:
        lengths, stored, rows = truth(shard)
        return lengths, stored, [{**row, "../../out": row["teacher_loss"]} for row in rows]

    monkeypatch.setattr(synthetic, "truth", named)
    monkeypatch.setattr(synthetic, "FIELDS", bad)
    path = synthetic.write(tmp_path / "store")
    with pytest.raises(StoreCorrupt, match="is not a plain file name"):
        export(ExportConfig(str(path), str(tmp_path / "out"), "webdataset"))
    assert not list((tmp_path / "out").glob("*.tar"))
