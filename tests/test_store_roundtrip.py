"""What is written comes back: every kind of field, by index, slice and batch, in other processes and other readers."""

from __future__ import annotations

import json
import multiprocessing
import operator
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import synthetic_store as synthetic
from predistill.store import ConfigError, TeacherStore, gather

ROWS = synthetic.all_rows()
POSITIONED = ("teacher_positions", "teacher_completion_logits", "teacher_sizes", "teacher_samples")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("stores") / "every kind")


@pytest.fixture(scope="module")
def store(path: Path) -> TeacherStore:
    return TeacherStore.open(path)


def check(batch: dict[str, Any], ids: Any) -> None:
    """A padded batch against the plain values, row by row, padding included."""
    ids = np.asarray(ids)
    size = max(len(ROWS[i]["input_ids"]) for i in ids)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(ids), size)
    for at, i in enumerate(ids):
        row, length = ROWS[i], len(ROWS[i]["input_ids"])
        assert batch["attention_mask"][at].tolist() == [1] * length + [0] * (size - length)
        for spec in synthetic.FIELDS:
            if spec.name in POSITIONED or spec.name not in batch:
                continue
            got, want = batch[spec.name][at], row[spec.name]
            if spec.codec in ("bytes", "arrow"):
                assert got == want
                continue
            own = got[tuple(slice(n) for n in np.shape(want))]
            bound = synthetic.EXACT.get(spec.name, 1e-7) * np.abs(np.nan_to_num(want)).max(initial=0)
            np.testing.assert_allclose(own, want, rtol=0, atol=bound + 1e-12, err_msg=spec.name)
            assert (np.nan_to_num(got) != spec.pad).sum() == (np.nan_to_num(own) != spec.pad).sum(), (
                f"{spec.name}: padding"
            )
        check_positions({name: value[at] for name, value in batch.items()}, row)


def check_positions(one: dict[str, Any], row: dict[str, Any]) -> None:
    mask = np.zeros(len(one["attention_mask"]), bool)
    mask[row["teacher_positions"]] = True
    assert (one["teacher_mask"] == mask).all()
    np.testing.assert_allclose(one["teacher_completion_logits"][mask], row["teacher_completion_logits"], rtol=1e-6)
    assert not one["teacher_completion_logits"][~mask].any()
    assert (one["teacher_sizes"][mask] == row["teacher_sizes"]).all()
    samples, most = one["teacher_samples"], row["teacher_samples"].shape[1]
    np.testing.assert_allclose(samples[mask][:, :most], row["teacher_samples"], rtol=0, atol=1 / 500)
    assert (samples[~mask] == -9).all() and (samples[:, most:] == -9).all()


def test_rows_by_index_slice_and_list(store: TeacherStore) -> None:
    rows = store.select()
    assert len(rows) == len(ROWS) == 80
    check(rows[[4, 1, 9, 9, 79, 31]], [4, 1, 9, 9, 79, 31])
    check(rows[28:33], range(28, 33))
    check(rows[[-1, 0]], [79, 0])
    one = rows[7]
    assert one["input_ids"].shape == ROWS[7]["input_ids"].shape and one["meta"] == ROWS[7]["meta"]
    with pytest.raises(IndexError, match="row 80 is not among the 80"):
        rows[[80]]
    with pytest.raises(ConfigError, match="list of integers"):
        rows[[0.5]]  # type: ignore[list-item]


def test_empty_requests_give_empty_arrays(store: TeacherStore) -> None:
    batch = store.select()[[]]
    assert batch["input_ids"].shape == (0, 0) and batch["teacher_feature_map"].shape == (0, 2, 3, 4)


@pytest.mark.parametrize("wide", [0, 100, gather.WIDE])  # every row copied by itself, some, none of these
@pytest.mark.parametrize("size", [1, 5, 32])
def test_batches_are_the_rows_in_the_order_asked_for(
    store: TeacherStore, size: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "WIDE", wide)
    rng = np.random.default_rng(size)
    ids = [rng.integers(0, 80, size).tolist() for _ in range(40)]
    for asked, batch in zip(ids, store.select().batches(ids), strict=True):
        check(batch, asked)


def test_a_batch_stays_valid_while_its_buffers_last(store: TeacherStore) -> None:
    ids = [[at, at + 1] for at in range(0, 60, 2)]
    held: list[Any] = []
    for asked, batch in zip(ids, store.select(fields=["teacher_logits"]).batches(ids, buffers=4), strict=True):
        held = [*held[-2:], (asked, batch)]  # this one and the two before it
        for earlier, kept in held:
            np.testing.assert_allclose(kept["teacher_logits"], [ROWS[i]["teacher_logits"] for i in earlier], atol=2e-3)


def test_owned_arrays_are_not_reused(store: TeacherStore) -> None:
    rows = store.select()
    first = rows[[0, 1]]
    before = first["teacher_feature_map"].copy()
    rows[[2, 3]]
    assert (first["teacher_feature_map"] == before).all()


def test_an_error_in_the_prefetch_thread_reaches_the_caller(store: TeacherStore) -> None:
    batches = store.select().batches([[0], [1], [999]])
    with pytest.raises(IndexError, match="999"):
        list(batches)


def test_select_by_split_sql_and_fields(store: TeacherStore) -> None:
    rows = store.select("train", where="label = 1 AND view = 0", fields=["teacher_logits"])
    assert rows.sample_ids.tolist() == [i for i in range(50) if ROWS[i]["labels"] == 1]
    assert set(rows[[0]]) == {"input_ids", "token_type_ids", "attention_mask", "labels", "teacher_logits"}
    assert store.select("validation").sample_ids.tolist() == list(range(70, 80))
    assert store.select("train").lengths.tolist() == [len(row["input_ids"]) for row in ROWS[:70]]
    with pytest.raises(ConfigError, match="it has train, validation"):
        store.select("test")
    with pytest.raises(ConfigError, match="'teacher_logit' is not stored"):
        store.select(fields=["teacher_logit"])
    with pytest.raises(ConfigError, match="where 'nonsense > 3' is no SQL condition"):
        store.select(where="nonsense > 3")


def test_a_whole_column(store: TeacherStore) -> None:
    assert store.select("train").column("labels").tolist() == [int(row["labels"]) for row in ROWS[:70]]
    with pytest.raises(ConfigError, match="differs in length"):
        store.select().column("input_ids")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_other_processes_read_the_same(store: TeacherStore, method: str) -> None:
    rows = store.select(where="view = 0")
    rows[[0]]  # mapped before the fork
    with multiprocessing.get_context(method).Pool(1) as pool:
        check(pool.apply(operator.getitem, (rows, [3, 40])), [3, 40])


def test_plain_pyarrow_reads_a_shard(path: Path) -> None:
    with pa.memory_map(str(path / "shards/train-00001.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table["input_ids"].to_pylist() == [row["input_ids"].tolist() for row in ROWS[30:50]]
    assert table["teacher_hidden_states_00"][0].as_py() == pytest.approx(
        ROWS[30]["teacher_hidden_states_00"].astype("f4")
    )
    assert table["meta"].to_pylist() == [row["meta"] for row in ROWS[30:50]]
    described = json.loads(table.schema.metadata[b"predistill.fields"])
    assert [field["name"] for field in described] == [spec.name for spec in synthetic.FIELDS]


def test_datasets_reads_a_split_and_pickles_small(store: TeacherStore) -> None:
    dataset = store.to_dataset("train")
    assert len(dataset) == 70
    assert dataset[33]["input_ids"] == ROWS[33]["input_ids"].tolist()
    again = pickle.loads(pickle.dumps(dataset))
    assert again[60]["image"] == ROWS[60]["image"]
    assert len(pickle.dumps(dataset)) < 10_000, "the table travels as a path, not as data"
    assert dataset.shuffle(seed=0).select(range(5)).map(lambda row: {"n": len(row["input_ids"])}, num_proc=2)["n"]


def test_the_index_says_what_the_rows_hold(store: TeacherStore) -> None:
    got = store.sql(
        "SELECT sample_id, split, source_index, view, label, num_tokens, teacher_loss, meta FROM samples ORDER BY 1"
    ).fetchall()
    for i, (sample_id, split, source_index, view, label, tokens, loss, meta) in enumerate(got):
        row = ROWS[i]
        assert (sample_id, split) == (i, "train" if i < 70 else "validation")
        assert (source_index, view) == ((i, 0) if i < 50 else (i - 50, 1) if i < 70 else (i - 70, 0))
        assert label == (None if row["labels"] == -100 else row["labels"]) and tokens == len(row["input_ids"])
        assert (loss is None) == bool(np.isnan(row["teacher_loss"])) and meta == row["meta"]
