"""Bad inputs, one line each; killed at any moment, the same command goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from augment_cases import own_cache, read_lines, save_masked_lm, settings, squad  # noqa: F401
from click.testing import CliRunner
from conftest import TEXTS
from dump_cases import write
from predistill.cli import cli
from predistill.store import ConfigError, DataError, OutOfSpace, StoreError, StoreMismatch
from predistill.teacher_dump import augment as story
from predistill.teacher_dump.augment import augment
from predistill.teacher_dump.augmentation.config import AugmentConfig
from predistill.teacher_dump.augmentation.parts import Work

ROWS = [{"text": text, "label": at % 2} for at, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_masked_lm(tiny_tokenizer_dir, tmp_path_factory.mktemp("masked_lm"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"multiplication_factor": 0}, "--multiplication-factor is a whole number from 1"),
        ({"candidates": 0}, "--candidates"),
        ({"seed": -1}, "--seed"),
        ({"replace_probability": 0.0}, "--replace-probability is above 0"),
        ({"replace_probability": 1.5}, "--replace-probability"),
        ({"max_length": 4}, "--max-length"),
        ({"output": "out.txt"}, "OUTPUT out.txt: a name that ends in one of"),
        ({"output": "out.parquet.gz"}, "OUTPUT out.parquet.gz"),
        ({"output": "folder.json"}, "is a folder"),
        ({"embeddings": "nowhere.txt"}, "--embeddings nowhere.txt: a file"),
        ({"text_column": "a", "text_pair_column": "a"}, "--text-pair-column a is --text-column too"),
        ({"masked_lm": " "}, "--masked-lm is empty"),
    ],
)
def test_settings_that_cannot_be(
    more: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**{"dataset": "in.jsonl", "output": "out.jsonl", "masked_lm": "m", **more})


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "a film"}, {"text": None}], {}, "row 1: column 'text' is null"),
        ([{"text": 3}], {}, "column 'text': text expected"),
        ([{"title": "a"}], {}, "a column text or tokens expected; it has 'title'"),
        ([{"title": "a"}], {"text_column": "body"}, "no column 'body'"),
        ([{"text": "a"}], {"text_pair_column": "b"}, "no column 'b'"),
        ([{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}], {}, "row 1: 2 tokens and 1 tags"),
        ([{"tokens": ["a"]}, {"tokens": None}], {}, "row 1: column 'tokens' is null"),
        ([{"tokens": ["a", None]}], {}, "row 0: column 'tokens' holds null"),
        ([{"tokens": [[1]]}], {}, "text, or lists of words, expected"),
        ([{"text": "a", "augmentation": 1}], {}, "has a column 'augmentation'"),
        ([{"id": "q7", "context": "a film", "answers": {"text": ["film"], "answer_start": [1]}}], {}, "question q7"),
        ([{"context": "a film", "answers": ["film"]}], {}, "column 'answers': lists text and answer_start"),
        ([{"text": "a film"}], {"split": "test"}, "--split test"),
    ],
)
def test_data_that_cannot_be(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], more: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as error:
        augment(settings(model, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", **more))
    assert "\n" not in str(error.value) and "--dataset" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "output", "message"),
    [
        ({"answer_start": 5}, "out.json", "question 0-0: its answer 'film' is not at answer_start 5"),
        ({"answer_start": None}, "out.json", "question 0-0"),
        ({"text": ""}, "out.json", "question 0-0"),
        ({}, "out.jsonl", "is SQuAD JSON; give a .json name"),
    ],
)
def test_questions_that_cannot_be(
    model: Path, tmp_path: Path, change: dict[str, Any], output: str, message: str
) -> None:
    content = squad(["a warm film"], [["film"]])
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(change)
    (tmp_path / "in.json").write_text(json.dumps(content))
    with pytest.raises((ConfigError, DataError), match=message):
        augment(settings(model, tmp_path / "in.json", tmp_path / output))


def test_questions_without_contexts(model: Path, tmp_path: Path) -> None:
    for content, message in (({"data": [{"paragraphs": [{"qas": []}]}]}, "article 0: paragraphs with a context"),
                             ({"data": [{"paragraphs": []}]}, "has no paragraphs")):  # fmt: skip
        (tmp_path / "in.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            augment(settings(model, tmp_path / "in.json", tmp_path / "out.json"))


def test_formats_that_cannot_hold_the_columns(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"tokens": ["a"]}])
    with pytest.raises(ConfigError, match=r"column 'tokens' holds .*, which .csv cannot"):
        augment(settings(model, source, tmp_path / "out.csv"))


def test_several_splits_need_a_choice(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    both = f"train={tmp_path / 'a.jsonl'},validation={tmp_path / 'a.jsonl'}"
    with pytest.raises(ConfigError, match="choose one with --split"):
        augment(settings(model, Path(both), tmp_path / "out.jsonl"))
    augment(settings(model, Path(both), tmp_path / "out.jsonl", split="train"))
    assert len(read_lines(tmp_path / "out.jsonl")) > len(ROWS)


def test_models_that_cannot(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(ConfigError, match="--masked-lm .* a folder with a saved model expected"):
        augment(settings(tmp_path / "nowhere", source, tmp_path / "out.jsonl"))
    with pytest.raises(ConfigError, match="--masked-lm .* which would be random: a masked language model expected"):
        augment(settings(tiny_teacher_dir, source, tmp_path / "out.jsonl"))


def test_what_was_begun_is_held_to_its_settings(model: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    first = augment(settings(model, source, output))
    before = output.stat().st_mtime_ns
    again = augment(settings(model, source, output, tokens_per_batch=50))
    assert {**again, "seconds": 0} == {**first, "seconds": 0} and output.stat().st_mtime_ns == before
    with pytest.raises(StoreMismatch, match="settings.seed differs: it was begun with 42, this run has 43"):
        augment(settings(model, source, output, seed=43))
    other = save_masked_lm(tiny_tokenizer_dir, tmp_path / "other", seed=1)
    with pytest.raises(StoreMismatch, match="identity.masked_lm.weights_sha256 differs"):
        augment(settings(other, source, output))
    write(source, ROWS[:-1])
    with pytest.raises(StoreMismatch, match="identity.rows differs"):
        augment(settings(model, source, output))
    augment(settings(model, source, output, overwrite=True))
    assert [row["augmentation"] for row in read_lines(output)][:6] == [0] * 5 + [1]
    output.write_text("mine")
    with pytest.raises(StoreError, match="was changed after it was written"):
        augment(settings(model, source, output))
    output.unlink()
    augment(settings(model, source, output))
    assert len(read_lines(output)) > 5


def test_a_file_of_other_making_is_left_alone(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    for output in (tmp_path / "mine.jsonl", source):
        output.write_text(source.read_text())
        with pytest.raises(ConfigError, match="is there already; give another name, or --overwrite"):
            augment(settings(model, source, output))
        assert read_lines(output) == ROWS
    with pytest.raises(ConfigError, match="--overwrite"):
        augment(settings(model, source, source))


def test_one_run_at_a_time(model: Path, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    with (
        Work.begin(output, {"parts": [], "settings": {}}, False),
        pytest.raises(StoreError, match="written by another augment"),
    ):
        augment(settings(model, source, output))


def test_no_room(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "free_bytes", lambda folder: 100)
    with pytest.raises(OutOfSpace, match="smaller --multiplication-factor"):
        augment(settings(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"))


def test_the_command(model: Path, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    words = ["augment", str(source), str(output), "--masked-lm", str(model), "--multiplication-factor", "2"]
    done = CliRunner().invoke(cli, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == len(read_lines(output))
    assert CliRunner().invoke(cli, [*words, "--seed", "1"]).exit_code == 1
    assert CliRunner().invoke(cli, words[:2]).exit_code == 2


SERVER = """
import json, os, signal, sys
import datasets, torch, transformers
import transformers.models.bert.modeling_bert
from predistill.teacher_dump import augment as story
from predistill.teacher_dump.augmentation.config import AugmentConfig

def work(config, last):
    done = 0

    def killing(call):
        def made(*given):
            nonlocal done
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given)
        return made

    os.fsync, os.replace = killing(os.fsync), killing(os.replace)
    story.augment(AugmentConfig(**config))

for line in sys.stdin:
    if not (child := os.fork()):
        work(*json.loads(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_anywhere_it_goes_on_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """kill -9 before one of the next fsyncs and renames, again and again until it is done."""
    source, output = write(tmp_path / "in.jsonl", ROWS * 4), tmp_path / "killed.jsonl"
    whole = settings(model, source, tmp_path / "whole.jsonl", part_words=40)
    augment(whole)
    config = {**vars(whole), "output": str(output)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    rng, codes = random.Random(0), [1]
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path) as server:  # fmt: skip
        assert server.stdin and server.stdout
        while codes[-1]:
            assert not output.exists() or output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
            server.stdin.write(json.dumps([config, rng.randint(5, 9)]) + "\n")
            server.stdin.flush()
            codes.append(int(server.stdout.readline()))
        server.stdin.close()
    assert set(codes[1:-1]) == {-signal.SIGKILL} and len(codes) > 5
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    folder = tmp_path / ".killed.jsonl.augment"
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp") == ["done.json", "lock", "plan.json"]
