"""Stores as `dump` writes them: merged, cut, and read by a student's rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import question_cases as cases
from dump_cases import own_cache, rows, settings, write  # noqa: F401  own_cache is a fixture
from predistill.store import TeacherStore
from predistill.store.convert.config import DropConfig, MergeConfig
from predistill.store.convert.drop import drop
from predistill.store.convert.merge import merge
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump


def test_hidden_states_that_were_dumped_later(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", rows(40))
    dump(settings(tiny_teacher_dir, data, tmp_path / "logits"))
    more = {"fields": ["logits", "hidden_states", "attentions"], "layers": "0,2", "attention_storage": "exact"}
    dump(settings(tiny_teacher_dir, data, tmp_path / "inside", **more))
    made = tmp_path / "both"
    assert merge(MergeConfig([str(tmp_path / "logits"), str(tmp_path / "inside")], str(made)))["merged"] == "fields"
    assert verify(made)["ok"]
    assert (made / "tokenizer").is_dir()
    with TeacherStore.open(made) as both, TeacherStore.open(tmp_path / "inside") as inside:
        assert set(both.fields) == set(inside.fields)
        left, right = (store.select(split="train")[list(range(40))] for store in (both, inside))
        assert np.array_equal(left["teacher_hidden_states_02"], right["teacher_hidden_states_02"])
        assert np.allclose(left["teacher_logits"], right["teacher_logits"], atol=1e-5)


def test_more_texts_and_fewer(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    stores = []
    for name, seed in (("one", 1), ("two", 2)):
        data = write(tmp_path / f"{name}.jsonl", rows(30, seed))
        dump(settings(tiny_teacher_dir, f"train={data}", tmp_path / name))
        stores.append(str(tmp_path / name))
    made = tmp_path / "both"
    config = MergeConfig(stores, str(made), duplicates="keep")
    assert merge(config)["merged"] == "rows"
    card = (made / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "| teacher_logits | " in card and "| merged from | stores of fingerprint " in card
    found = drop(DropConfig(stores[0], "label = 1", yes=True))
    assert found["splits"] == {"train": 15}
    assert "| samples | 15 |" in (tmp_path / "one" / "README.md").read_text()
    assert verify(stores[0])["ok"] and verify(made)["ok"]
    again = dump(settings(tiny_teacher_dir, f"train={tmp_path / 'one.jsonl'}", tmp_path / "one"))
    assert again["samples"] == 15  # the same dump does not bring them back
    with TeacherStore.open(made) as store:
        assert len(store.select(split="train", where="label = 1")) == 30


def test_a_question_goes_with_all_its_windows(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Its context stands in the first of them alone."""
    asked = cases.squad(12)
    data = write(tmp_path / "squad.jsonl", asked)
    dump(cases.settings(cases.reader(tiny_tokenizer_dir, tmp_path / "reader"), f"train={data}", tmp_path / "store"))
    store = tmp_path / "store"
    with TeacherStore.open(store) as opened:
        windows = dict(opened.sql("SELECT id, count(*) FROM samples GROUP BY id").fetchall())
    long = next(row for row in asked if windows[row["id"]] > 1)
    found = drop(DropConfig(str(store), f"id = '{long['id']}' AND view = 0", yes=True))
    assert (found["rows"], found["along"]) == (windows[long["id"]], windows[long["id"]] - 1)
    assert verify(store)["ok"]
    held = b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file())
    assert long["context"].encode() not in held and asked[-1]["context"].encode() in held
