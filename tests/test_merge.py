"""Merged stores against the stores they were made of, read with plain pyarrow."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import merge_cases
import numpy as np
import pytest
from click.testing import CliRunner
from merge_cases import ATTENTION, HIDDEN, LOGITS, TEXT, content, write
from predistill.cli import cli
from predistill.store import ConfigError, StoreCorrupt, StoreMismatch, TeacherStore
from predistill.store.convert.config import DropConfig, MergeConfig
from predistill.store.convert.drop import drop
from predistill.store.convert.merge import merge
from predistill.store.verify import verify


def merged(*stores: Path, **more: Any) -> Path:
    output = stores[0].parent / "merged"
    merge(MergeConfig([str(store) for store in stores], str(output), **more))
    found = verify(output)
    assert found["ok"], found["problems"]
    return output


def came(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / "store.json").read_text())["plan"]["identity"]["merged_from"]


def test_splits_side_by_side(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", {"train": range(20)}), write(tmp_path / "b", {"validation": range(30, 41)})
    made = merged(one, two)
    assert content(made) == {**content(one), **content(two)}
    with TeacherStore.open(made) as store:
        assert store.splits == {
            "train": {"samples": 20, "shards": 3, "tokens": sum(1 + n % 6 for n in range(20))},
            "validation": {"samples": 11, "shards": 2, "tokens": sum(1 + n % 6 for n in range(30, 41))},
        }
        assert store.settings["splits"] == ["train", "validation"]


def test_more_rows_of_another_dataset_get_other_addresses(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", {"train": range(20)}), write(tmp_path / "b", {"train": range(50, 60)})
    three = write(tmp_path / "c", {"train": range(80, 83)})
    made = merged(one, two, three)
    rows = content(made, ["source_index"])["train"]
    assert rows == [row for path in (one, two, three) for row in content(path, ["source_index"])["train"]]
    with TeacherStore.open(made) as store:
        assert [n for (n,) in store.sql("SELECT source_index FROM samples ORDER BY sample_id").fetchall()] == list(
            range(33)
        )
        assert [shard.start for shard in store.shards] == [0, 7, 14, 20, 27, 30]
    assert [one["splits"]["train"] for one in came(made)] == [
        {"rows": 20, "source_index_added": 0}, {"rows": 10, "source_index_added": 20},
        {"rows": 3, "source_index_added": 30},
    ]  # fmt: skip
    assert str(tmp_path) not in json.dumps(came(made))  # names say where, and are left out


def test_more_rows_at_addresses_of_their_own_keep_them(tmp_path: Path) -> None:
    one = write(tmp_path / "a", {"train": range(20)}, dataset="all")
    two = write(tmp_path / "b", {"train": range(20, 30)}, dataset="all", source={"train": range(20, 30)})
    made = merged(one, two)
    assert content(made)["train"] == content(one)["train"] + content(two)["train"]
    with TeacherStore.open(made) as store:
        assert store.identity["dataset"]["rows_sha256"] == "all"


def test_halves_of_a_store_make_it_whole_again(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", {"train": range(20)})
    one, two = (Path(shutil.copytree(whole, tmp_path / name)) for name in "ab")
    drop(DropConfig(str(one), "source_index >= 9", yes=True))
    drop(DropConfig(str(two), "source_index < 9", yes=True))
    assert content(merged(one, two))["train"] == content(whole)["train"]


def test_more_fields_of_the_same_rows(tmp_path: Path) -> None:
    rows = {"train": range(20), "validation": range(30, 39)}
    one = write(tmp_path / "a", rows, shard_rows=9)
    two = write(tmp_path / "b", rows, fields=(LOGITS, HIDDEN), shard_rows=4)
    three = write(tmp_path / "c", rows, fields=(ATTENTION, LOGITS), shard_rows=20)
    whole = write(tmp_path / "whole", rows, fields=(LOGITS, TEXT, HIDDEN, ATTENTION))
    made = merged(one, two, three)
    assert content(made) == content(whole)
    with TeacherStore.open(made) as store, TeacherStore.open(whole) as expected:
        assert list(store.fields) == list(expected.fields)
        assert [shard.stop - shard.start for shard in store.shards] == [4, 4, 1, 3, 4, 2, 2, 4, 4, 1]
        left, right = (each.select(split="validation")[list(range(9))] for each in (store, expected))
        assert all(np.array_equal(left[name], right[name], equal_nan=True) for name in left if name != "text")
    assert came(made)[1]["fields"] == list(TeacherStore.open(two).fields)


def refusal(*stores: Path, kind: type[Exception] = StoreMismatch, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        merged(*stores, **more)
    assert not (stores[0].parent / "merged").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_name_what_differs(tmp_path: Path) -> None:
    one = write(tmp_path / "a", {"train": range(20)})
    other = {"train": range(50, 60)}
    said = refusal(one, write(tmp_path / "teacher", other, teacher="b"))
    assert f"identity.teacher.weights_sha256 differs: {one} has {'a' * 12}, " in said and "has " + "b" * 12 in said
    assert "settings.max_length differs" in refusal(one, write(tmp_path / "set", other, settings={"max_length": 8}))
    assert "label_names.1 differs" in refusal(one, write(tmp_path / "names", other, label_names=["x", "w", "z"]))
    wide = dataclasses.replace(LOGITS, dtype="float32")
    assert "fields.teacher_logits.dtype differs" in refusal(one, write(tmp_path / "wide", other, fields=(wide, TEXT)))
    assert "fields.text" in refusal(one, write(tmp_path / "less", other, fields=(LOGITS,)))
    tokens = write(tmp_path / "tok", other, identity={"tokenizer": {"sha256": "7" * 64}})
    assert "identity.tokenizer.sha256 differs" in refusal(one, tokens)
    with pytest.raises(ConfigError, match="pull it first"):
        MergeConfig([str(one), "s3://user:secret@bucket/store"], "out")


def test_rows_in_part_the_same_are_counted(tmp_path: Path) -> None:
    one = write(tmp_path / "a", {"train": range(20)})
    said = refusal(one, write(tmp_path / "b", {"train": [*range(11), *range(70, 75)]}))
    assert "train: 20 rows and 16, 11 shared" in said and "train source_index 11, view 0: content " in said
    said = refusal(one, write(tmp_path / "c", {"train": range(20), "test": range(3)}, fields=(LOGITS, HIDDEN)))
    assert f"test: in {tmp_path / 'c'} alone" in said


def test_rows_said_twice_are_refused_or_kept(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", {"train": range(20)}), write(tmp_path / "b", {"train": [90, 91, 4, 17]})
    said = refusal(one, two)
    assert "2 of 4 rows of split train" in said and "the first is source_index 2" in said
    assert len(content(merged(one, two, duplicates="keep"))["train"]) == 24


def test_nothing_to_merge(tmp_path: Path) -> None:
    one = write(tmp_path / "a", {"train": range(20)})
    two = Path(shutil.copytree(one, tmp_path / "b"))
    assert "nothing to merge" in refusal(one, two, kind=ConfigError)
    assert "given twice" in refusal(one, one, kind=ConfigError)
    with pytest.raises(ConfigError, match="give a folder elsewhere"):
        merge(MergeConfig([str(one), str(two)], str(one)))
    with pytest.raises(ConfigError, match="two stores or more"):
        MergeConfig([str(one)], "out")


def test_other_inputs_of_the_same_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "a", {"train": range(20)})
    plain = merge_cases.row

    def other(n: int, teacher: str = "a") -> dict[str, Any]:
        made = plain(n, teacher)
        return {**made, "input_ids": made["input_ids"] + (n == 13)}

    monkeypatch.setattr(merge_cases, "row", other)
    two = write(tmp_path / "b", {"train": range(20)}, fields=(LOGITS, HIDDEN), shard_rows=3)
    said = refusal(one, two)
    assert "column input_ids differs" in said and "train source_index 13;" in said


def test_other_versions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a", {"train": range(20)})
    made = merged(one, write(tmp_path / "b", {"test": range(3)}, identity={"versions": {"torch": "3"}}))
    assert "note: versions.torch differs" in capsys.readouterr().err
    assert [each["versions"] for each in came(made)] == [{"torch": "2"}, {"torch": "3"}]


def test_damage_and_links_are_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", {"train": range(20)}), write(tmp_path / "b", {"test": range(9)})
    path = two / "shards" / "test-00001.arrow"
    data = path.read_bytes()
    assert b"text 8" in data
    path.write_bytes(data.replace(b"text 8", b"text 9"))
    with pytest.raises(StoreCorrupt, match=r"test-00001.arrow is not what the dump wrote"):
        merge(MergeConfig([str(one), str(two)], str(tmp_path / "merged")))
    shutil.rmtree(tmp_path / "merged")
    (one / "tokenizer").symlink_to("/etc")
    assert "no links" in refusal(one, two, kind=StoreCorrupt)


KILLER = """
import os, signal, sys
from predistill.store.convert import merge as module
from predistill.store.convert.config import MergeConfig
left, real = [int(sys.argv[1])], module.commit
def commit(*given):
    left[0] -= 1
    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
    real(*given)
module.commit = commit
module.merge(MergeConfig(sys.argv[3:], sys.argv[2]))
"""


def test_killed_it_goes_on(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", {"train": range(20)}), write(tmp_path / "b", {"train": range(50, 60)})
    whole, made = merged(one, two), tmp_path / "again"
    words = [sys.executable, "-c", KILLER, "3", str(made), str(one), str(two)]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert len(list((made / "shards").glob("*.json"))) == 3 and not (made / "store.json").exists()
    written = {path.name: path.stat().st_mtime_ns for path in (made / "shards").glob("*.arrow")}
    with pytest.raises(StoreMismatch, match="merged_from"):
        merge(MergeConfig([str(two), str(one)], str(made)))
    said = merge(MergeConfig([str(one), str(two)], str(made)))
    assert said["complete"] and said["merged"] == "rows" and verify(made)["ok"]
    for path in (whole / "shards").iterdir():
        assert path.read_bytes() == (made / "shards" / path.name).read_bytes()
    assert all((made / "shards" / name).stat().st_mtime_ns == at for name, at in written.items())
    assert merge(MergeConfig([str(one), str(two)], str(made)))["complete"]  # nothing left to do


def test_command(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", {"train": range(20)}), write(tmp_path / "b", {"test": range(9)})
    words = ["merge", str(one), str(two), "--output-dir", str(tmp_path / "merged")]
    done = CliRunner().invoke(cli, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["splits"]["test"]["samples"] == 9
    bad = CliRunner().invoke(cli, ["merge", str(one), "--output-dir", str(tmp_path / "other")])
    assert bad.exit_code == 1 and bad.stderr.startswith("Error: two stores")


def test_language_models(tmp_path: Path) -> None:
    """Positions and counts of kept logits come along with the columns that they count."""
    import torch
    from language_store import write_store

    def teacher(ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([torch.randn(40, generator=torch.Generator().manual_seed(one)) * 3 for one in ids])

    rows = {"train": [([*range(2 + n % 5)], [-100, *range(1, 2 + n % 5)]) for n in range(23)]}
    kinds: list[dict[str, Any]] = [{"kind": "top-k", "top_p": 0.8}, {"kind": "dense"}]
    for name, kind in zip("ab", kinds, strict=True):
        write_store(tmp_path / name, rows, teacher, completion=True, shard_rows=6 if name == "a" else 9, **kind)
    with TeacherStore.open(merged(tmp_path / "a", tmp_path / "b")) as store:
        batch = store.select(split="train")[[3, 22]]
        for name in "ab":
            with TeacherStore.open(tmp_path / name) as source:
                own = source.select(split="train")[[3, 22]]
            assert all(np.array_equal(batch[column], own[column]) for column in own)
    write_store(tmp_path / "c", rows, teacher, kind="dense", completion=False)
    shutil.rmtree(tmp_path / "merged")
    with TeacherStore.open(merged(tmp_path / "a", tmp_path / "c")) as store:
        assert store.fields["teacher_logits"].shape[0] == "S" and store.fields["teacher_positions"].shape == ("P",)
