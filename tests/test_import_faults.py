"""What strangers' files may hold, and what may happen while they are read: one line each, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from import_cases import CONFIG, VOCABULARY, K, distillkit, documents, imported, lines, parquet, top_k_rows, vllm_row
from predistill.store import ConfigError, DataError, PredistillError, StoreMismatch
from predistill.store.verify import verify
from predistill.teacher_dump.importing.config import ImportConfig

TOP_K = {"ids_column": "ids", "values_column": "logprobs"}
DOCS = documents(20)
Row = dict[str, Any]


def _longer(row: Row) -> None:
    row["ids"].append([1])
    row["logprobs"].append([-1.0])


def _set(name: str, at: int, value: Any) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row[name][at] = value

    return change


def _entry(name: str, value: Any) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row[name][1][0] = value

    return change


def _given(name: str, value: Any) -> Callable[[Row], None]:
    return lambda row: row.update({name: value})


BROKEN = {
    "too many positions": (_longer, r"tokens, so entries of \d+ or \d+ positions expected; got \d+"),
    "an id beyond": (_entry("ids", VOCABULARY), "id 40 at position 1, where the vocabulary has 40"),
    "a negative id": (_entry("ids", -1), "id -1 at position 1, where none below 0"),
    "a large id": (_entry("ids", 2**70), "ids: numbers below 2\\*\\*63 expected"),
    "half an id": (_entry("ids", 1.5), "ids are whole numbers"),
    "text for an id": (_entry("ids", "7"), "ids: numbers expected; got text"),
    "true for an id": (_entry("ids", True), "ids: numbers expected; got true or false"),
    "not a number": (_entry("logprobs", float("nan")), "position 1: numbers expected; got nan"),
    "infinite": (_entry("logprobs", float("inf")), "position 1: numbers expected; got inf"),
    "logits": (_entry("logprobs", 3.0), r"sum to at most 1 expected; got .* \(if these are logits: --values logits\)"),
    "a value more": (_set("logprobs", 0, [-1.0] * (K + 1)), f"position 0 has {K} ids and {K + 1} values"),
    "an id twice": (_set("ids", 1, [5] * K), "position 1 has id 5 twice"),
    "a token beyond": (_set("input_ids", 0, VOCABULARY), "token 40 at position 0, where the vocabulary has 40"),
    "one token": (_given("input_ids", [1]), "two tokens at least expected"),
    "no tokens": (_given("input_ids", None), "column 'input_ids' expected; it is null"),
    "flat": (_given("ids", [1, 2, 3]), "ids: a list for each token expected; got int"),
    "an object": (_given("ids", {"a": 1}), "ids: a list expected; got an object"),
    "shifted labels": (_given("labels", [1, 2]), "labels expected, one a token; got 2"),
    "no labels at all": (_given("labels", None), None),
    "a hole in the mask": (_given("attention_mask", None), None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_that_do_not_fit_are_refused_by_number(name: str, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    rows = top_k_rows(DOCS)
    change(rows[7])
    source = lines(tmp_path / "rows.jsonl", rows)
    options = {"vocabulary": VOCABULARY, **TOP_K}
    if message is None:
        imported(source, tmp_path / "store", **options)
        return
    with pytest.raises(DataError, match=f"split train, row 7: .*{message}") as caught:
        imported(source, tmp_path / "store", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_all_bad_rows_are_counted(tmp_path: Path) -> None:
    rows = top_k_rows(DOCS)
    for at in (3, 5, 6, 9, 11, 13, 17):
        _longer(rows[at])
    expected = r"row 3: .* \(7 rows do not fit; also split train, row 5; .*row 6; .*row 9; split train, row 11; …\)"
    with pytest.raises(DataError, match=expected):
        imported(lines(tmp_path / "rows.jsonl", rows), tmp_path / "store", **TOP_K)


def test_labels_and_masks(tmp_path: Path) -> None:
    for column, value, message in (
        ("labels", lambda row: [*row["input_ids"][1:], -100], "labels that are shifted to the next token"),
        ("labels", lambda row: [-100] * len(row["input_ids"]), "a labelled token that the teacher speaks of expected"),
        ("attention_mask", lambda row: [1, 0, *[1] * (len(row["input_ids"]) - 2)], "padding at the ends"),
        ("attention_mask", lambda row: [1], "attention_mask of .* tokens expected; got 1"),
    ):
        rows = top_k_rows([([1, 2, 3, 4], DOCS[3][1][:4])] * 3)
        rows[1][column] = value(rows[1])  # type: ignore[no-untyped-call]
        with pytest.raises(DataError, match=f"row 1: .*{message}"):
            imported(lines(tmp_path / "rows.jsonl", rows), tmp_path / "store", **TOP_K)


@pytest.mark.parametrize("said, message", [
    ({"prompt_logprobs": [None, {"1": -0.5}, {"2": -0.5}]}, "prompt_token_ids or input_ids expected"),
    ({"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None]}, "3 tokens, so prompt_logprobs of as many positions"),
    ({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"a": -0.5}]}, "token ids expected; got 'a'"),
    ({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"1": "x"}]}, "a log-probability is a number"),
    ({"prompt_token_ids": [1, 2], "prompt_logprobs": [None, [1]]}, "an object by token id, or null"),
    ({"prompt_token_ids": [1, 2], "prompt_logprobs": "[null"}, "a list expected; got text that is no JSON"),
    ({"prompt_token_ids": [1, 2], "choices": [{"prompt_logprobs": []}, {}]}, "one of choices a row expected; got 2"),
    ({"choices": [{"logprobs": {"content": [{"token": " a", "logprob": -1}]}}]}, "the id of token ' a' is not known"),
    ({"choices": [{"logprobs": {"content": [{"token": "token_id:1", "logprob": -1}]}}]}, "what the answer continues"),
    ({"choices": [{"logprobs": {"content": [7]}}]}, "content: an object for each token expected"),
    ({"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [], "top_logprobs": []}}]}, "as long expected"),
    ({"choices": [{"logprobs": None}]}, "logprobs with content"),
])  # fmt: skip
def test_answers_that_do_not_fit(said: Row, message: str, tmp_path: Path) -> None:
    form = "vllm" if "prompt" in json.dumps(said) else "openai"
    with pytest.raises(DataError, match=f"split train, row 0: .*{message}"):
        imported(lines(tmp_path / "rows.jsonl", [said]), tmp_path / "store", format=form)


@pytest.mark.parametrize("change, message", [
    ({"k": 7}, "7 numbers of 6 bits take 6 bytes; got 5"),
    ({"term_dtype": "float64"}, "bytes a position expected, by the YAML file; got"),
    ({"d": 8}, "numbers of 3 bits|where the vocabulary has 8"),
    ({"exact_dtype": "float8"}, "one of float16"),
    ({"exact_k": 9}, "exact_k and the bins"),
    ({"polynomial_terms": ["system"]}, "polynomial_terms are powers"),
    ({"k": None}, "a whole number from 1"),
    ({"residual_bins": [{"element_bits": 99, "num_elements": 1, "scale_dtype": "float32"}]}, "number from 1 to 32"),
])  # fmt: skip
def test_distillkit_settings_that_are_not_those_of_the_files(change: Row, message: str, tmp_path: Path) -> None:
    folder = distillkit(tmp_path / "captured", DOCS[:3], CONFIG)
    (folder / "compression_config.yaml").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises((ConfigError, DataError), match=message):
        imported(folder, tmp_path / "store")
    (folder / "compression_config.yaml").unlink()
    with pytest.raises(ConfigError, match="compression_config.yaml expected beside the files"):
        imported(folder, tmp_path / "store")
    (tmp_path / "other.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="cannot be read"):
        imported(folder, tmp_path / "store", compression_config=str(tmp_path / "other.yaml"))


def test_settings_and_files_that_cannot_be(tmp_path: Path) -> None:
    source = parquet(tmp_path / "rows.parquet", top_k_rows(DOCS))
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(source.read_bytes()[:-30])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1]}\n{"input_ids"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "text.csv").write_text("a\n")
    for given, message in (
        ({"source": source}, "columns of a known format expected; the first row has 'input_ids', 'ids', 'logprobs'"),
        ({"source": source, "format": "top-k"}, "--ids-column and --values-column expected"),
        ({"source": source, "ids_column": "ids"}, "give both"),
        ({"source": source, "ids_column": "ids", "values_column": "p"}, "a column 'p' expected"),
        ({"source": source, "format": "vllm", **TOP_K}, "names its own columns"),
        ({"source": source, "format": "onnx"}, "--format is one of"),
        ({"source": source, "vocabulary": 1, **TOP_K}, "--vocabulary is a whole number from 2"),
        ({"source": source, "tokenizer": str(tmp_path / "empty"), **TOP_K}, "--tokenizer .* cannot be loaded"),
        ({"source": source, "compression_config": str(source), **TOP_K}, "is DistillKit's, and this is top-k"),
        ({"source": torn, **TOP_K}, "torn.parquet cannot be read"),
        ({"source": tmp_path / "empty"}, "the folder has none"),
        ({"source": tmp_path / "empty.jsonl", **TOP_K}, "a row expected; it has none"),
        ({"source": tmp_path / "bad.jsonl", "ids_column": "input_ids", "values_column": "input_ids"},
         "bad.jsonl, line 2 is not JSON"),
        ({"source": tmp_path / "list.jsonl", **TOP_K}, "line 1: one JSON object a row expected; got list"),
        ({"source": tmp_path / "deep.jsonl", **TOP_K}, "line 1 is not JSON"),
        ({"source": tmp_path / "text.csv"}, "one of .parquet, .jsonl, .json expected"),
        ({"source": "nobody/nothing"}, "SOURCE nobody/nothing: a file or folder expected"),
        ({"source": tmp_path / "not.parquet"}, "SOURCE .*: .* is not there"),
    ):  # fmt: skip
        with pytest.raises((ConfigError, DataError), match=message) as caught:
            imported(str(given.pop("source")), tmp_path / "store", **given)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()
    assert ImportConfig(source="a", output_dir="b").shard_size == 256_000_000


def test_other_rows_or_settings_are_another_store(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", [vllm_row(*doc) for doc in DOCS])
    imported(source, tmp_path / "store")
    imported(source, tmp_path / "store", teacher="what a name says is information only")
    for given, message in (
        ({"dtype": "float32"}, "settings.dtype differs"), ({"vocabulary": 400}, "settings.vocabulary differs"),
    ):  # fmt: skip
        with pytest.raises(StoreMismatch, match=message):
            imported(source, tmp_path / "store", **given)
    lines(source, [vllm_row(*doc) for doc in DOCS[1:]])
    with pytest.raises(StoreMismatch, match="identity.dataset.rows"):
        imported(source, tmp_path / "store")
    assert imported(source, tmp_path / "store", overwrite=True).splits["train"]["samples"] == 19


SERVER = """
import json, os, signal, sys
import pyarrow.parquet
import predistill.store.index, predistill.store.verify
from predistill.store import PredistillError, atomic, manifest, shard
from predistill.teacher_dump import import_outputs as story
from predistill.teacher_dump.importing.config import ImportConfig

def work(order):
    left = [order["steps"]]
    replace = os.replace
    def counted(*given):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*given)
    os.replace = counted
    story.import_outputs(ImportConfig(**order["config"]))

for line in sys.stdin:
    if not (child := os.fork()):
        try:
            work(json.loads(line))
        finally:
            os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_every_file_that_it_puts_in_place(tmp_path: Path) -> None:
    """kill -9 at each rename, and the same command at once: the store is that of an undisturbed import."""
    source = parquet(tmp_path / "rows.parquet", top_k_rows(DOCS), row_group_size=4)
    options: Row = {"shard_size": 1000, "vocabulary": VOCABULARY, **TOP_K}
    whole = imported(source, tmp_path / "whole", **options)
    assert len(whole.shards) > 4
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as server:  # fmt: skip
        assert server.stdin and server.stdout

        def run(steps: int) -> int:
            config = {"source": str(source), "output_dir": str(tmp_path / "store"), **options}
            print(json.dumps({"steps": steps, "config": config}), file=server.stdin, flush=True)
            assert server.stdout
            return int(server.stdout.readline())

        kills = 0
        while run(3 + kills % 4) != 0:  # a shard is two files, and the end of an import is four
            kills += 1
            assert kills < 20
        server.stdin.close()
    assert kills > 4
    assert verify(tmp_path / "store")["ok"]
    for shard in whole.shards:
        left, right = ((tmp_path / name / "shards" / f"{shard.name}.arrow").read_bytes() for name in ("whole", "store"))
        assert left == right


def test_a_source_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from predistill.teacher_dump import import_outputs as story

    source = lines(tmp_path / "rows.jsonl", top_k_rows(DOCS))
    write = story._write

    def disturbed(*given: Any) -> None:
        lines(source, top_k_rows(documents(20, seed=1)))
        write(*given)

    monkeypatch.setattr(story, "_write", disturbed)
    with pytest.raises(PredistillError, match="rows.jsonl changed while it was read"):
        imported(source, tmp_path / "store", **TOP_K)
    assert not (tmp_path / "store" / "store.json").exists()


def test_what_unpacks_to_more_than_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from predistill.teacher_dump.importing import files

    monkeypatch.setattr(files, "_LARGEST", 5000)
    for name, message in (("rows.jsonl.gz", "line 2: at most 1 GB"), ("rows.json.gz", "a JSON document of at most")):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(json.dumps(top_k_rows(DOCS)[0]) + "\n" + " " * 100_000)
        with pytest.raises(DataError, match=message):
            imported(tmp_path / name, tmp_path / "store", **TOP_K)
