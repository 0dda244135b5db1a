"""What a dump refuses, and why; what it plans before; what it does when a part of it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dump_cases import (
    bert,
    own_cache,  # noqa: F401  a fixture
    rows,
    saved,
    settings,
    write,
)
from predistill.store import (
    ConfigError,
    DataError,
    StoreMismatch,
)
from predistill.teacher_dump import dump as story
from predistill.teacher_dump.background import Ahead, Background
from predistill.teacher_dump.capture import Capture
from predistill.teacher_dump.dump import dump
from predistill.teacher_dump.teachers.teacher import Teacher
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float16"}, r'settings\.dtype differs: the store has "float32", this run has "float16"'),
        ({"max_length": 20}, r"settings\.max_length differs: the store has 64, this run has 20"),
        ({"tokens_per_batch": 64}, r"settings\.tokens_per_batch differs: the store has 256, this run has 64"),
        ({"label_column": "none"}, r'settings\.label_column differs: the store has "label", this run has null'),
        (
            {"teacher_dtype": "bfloat16"},
            r'identity\.teacher\.dtype differs: the store has "auto", this run has "bfloat16"',
        ),
        ({"attention": "eager"}, r"identity\.teacher\.attention differs"),
        ({"keep_columns": ["text"]}, r"settings\.keep_columns differs"),
        ({"shard_size": 4000}, r"settings\.shard_size differs: the store has 2000, this run has 4000"),
    ],
)
def test_other_settings_are_refused_by_name(
    tiny_teacher_dir: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    data = write(tmp_path / "a.jsonl", rows(20))
    dump(settings(tiny_teacher_dir, data, tmp_path / "s", shard_size=2000))
    with pytest.raises(StoreMismatch, match=words):
        dump(settings(tiny_teacher_dir, data, tmp_path / "s", **{"shard_size": 2000, **change}))


def test_other_content_is_refused_by_name(tiny_teacher_dir: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    content = rows(20)
    data = write(tmp_path / "a.jsonl", content)
    dump(settings(tiny_teacher_dir, data, tmp_path / "s"))
    content[7]["text"] += "!"
    with pytest.raises(StoreMismatch, match=r"identity\.dataset\.rows_sha256 differs"):
        dump(settings(tiny_teacher_dir, write(tmp_path / "b.jsonl", content), tmp_path / "s"))
    other = shutil.copytree(tiny_teacher_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(StoreMismatch, match=r"identity\.teacher\.config_sha256 differs"):
        dump(settings(other, data, tmp_path / "s"))
    weights = bytearray((tiny_teacher_dir / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    shutil.copytree(tiny_teacher_dir, tmp_path / "third")
    (tmp_path / "third" / "model.safetensors").write_bytes(weights)
    with pytest.raises(StoreMismatch, match=r"identity\.teacher\.weights_sha256 differs"):
        dump(settings(tmp_path / "third", data, tmp_path / "s"))
    assert dump(settings(tmp_path / "third", data, tmp_path / "s", overwrite=True))["complete"]


def test_a_plan_without_shards_holds_nobody(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "a.jsonl", rows(20))
    with monkeypatch.context() as patched:
        patched.setattr(Capture, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            dump(settings(tiny_teacher_dir, data, tmp_path / "s"))
    assert dump(settings(tiny_teacher_dir, data, tmp_path / "s", dtype="bfloat16"))["complete"]


def test_plan_and_dry_run_write_nothing(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(200))
    config = settings(tiny_teacher_dir, data, tmp_path / "s", shard_size=20_000, keep_columns=["text"], dry_run=True)
    found = dump(config)
    assert not (tmp_path / "s").exists()
    assert {"bytes", "bytes_per_sample", "shards", "samples", "seconds", "free_bytes"} <= set(found) and found[
        "seconds"
    ] > 0
    real = dump(settings(tiny_teacher_dir, data, tmp_path / "s", shard_size=20_000, keep_columns=["text"]))
    assert found["samples"] == real["samples"] == 200
    assert found["shards"] == real["splits"]["train"]["shards"] > 1
    assert found["tokens"] == real["splits"]["train"]["tokens"]
    assert abs(found["bytes"] / real["bytes"] - 1) < 0.25  # a shard of 20 kB spends a fifth on describing itself


def test_bad_rows_are_found_before_the_teacher_runs(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "load", lambda self: pytest.fail("the teacher was loaded"))

    def refused(words: str, content: list[dict[str, Any]], **more: Any) -> None:
        with pytest.raises((DataError, ConfigError), match=words) as caught:
            dump(settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", content), tmp_path / "s", **more))
        assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()

    refused("no column 'sentence'; it has 'text', 'label'", rows(3), text_column="sentence")
    refused("no column 'gold'; it has", rows(3), label_column="gold")
    refused("no column 'kept'; it has", rows(3), keep_columns=["kept"])
    refused("row 2: column 'text' is null", [*rows(2), {"text": None, "label": 0}])
    refused(
        "row 1: column 'label' is 2; the teacher has 2 classes", [{"text": "a", "label": 1}, {"text": "a", "label": 2}]
    )
    refused("column 'text': text expected; got int64", [{"text": 3, "label": 1}])
    refused("column 'text': text expected; got null", [{"text": None, "label": 1}])
    refused("--max-length 99: the teacher takes at most 64", rows(3), max_length=99)
    refused("--max-length 3: 3 special tokens leave no room", rows(3), max_length=3)
    refused("has a column of that name", rows(3), keep_columns=["label"])
    refused("--label-names: the teacher has 2 classes; got 1", rows(3), label_names=["a"])
    refused("--device cuda:63 cannot be used here", rows(3), device="cuda:63")
    (tmp_path / "s").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        dump(settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", rows(3)), tmp_path / "s"))


def test_teachers_that_cannot_be(tiny_teacher_dir: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        dump(settings(tmp_path / "empty", data, tmp_path / "s"))
    vocab = len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    backbone = BertModel(
        BertConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(
        ConfigError, match=r"its weights lack classifier\.bias, classifier\.weight, which would be random"
    ):
        dump(settings(saved(backbone, tiny_tokenizer_dir, tmp_path / "backbone"), data, tmp_path / "s"))
    remote = shutil.copytree(tiny_teacher_dir, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    del config["model_type"]
    code = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (remote / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    (remote / "evil.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ConfigError, match="is Python code of its own.*--trust-remote-code"):
        dump(settings(remote, data, tmp_path / "s"))


def test_outputs_that_the_dtype_cannot_hold_stop_the_dump(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = bert(tiny_tokenizer_dir, tmp_path / "t", num_labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    for value, words in (
        (1e6, r"teacher_logits: .* at source row \d+ is more than float16 holds .* --dtype bfloat16 or float32"),
        (float("nan"), r"teacher_logits: the teacher gave nan at source row \d+"),
    ):
        torch.nn.init.constant_(model.classifier.bias, value)
        model.save_pretrained(teacher)
        with pytest.raises(DataError, match=words):
            dump(settings(teacher, write(tmp_path / "a.jsonl", rows(30)), tmp_path / "s", dtype="float16"))


def test_out_of_memory_says_what_to_do(tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Any, **_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(BertForSequenceClassification, "forward", too_large)
    monkeypatch.setattr(Teacher, "inputs", {"token_type_ids"})
    with pytest.raises(
        ConfigError, match=r"cpu is out of memory at a batch of \d+ rows of \d+ tokens.*--tokens-per-batch \d+"
    ):
        dump(settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", rows(30)), tmp_path / "s"))


def test_a_writer_that_fails_stops_the_dump(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    call = Capture.__call__

    def counting(self: Capture, *given: Any) -> Any:
        batches.append(given)
        return call(self, *given)

    monkeypatch.setattr(Capture, "__call__", counting)
    monkeypatch.setattr(story.ShardKeeper, "keep", lambda *_: (_ for _ in ()).throw(OSError("the disk is on fire")))
    with pytest.raises(OSError, match="the disk is on fire"):
        dump(settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", rows(400)), tmp_path / "s", tokens_per_batch=64))
    assert len(batches) < 30  # of 400 rows in batches of one to four


def test_progress_is_for_terminals(tiny_teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump(settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", rows(60)), tmp_path / "s"))
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1 and output.err.startswith("60 rows of ")


def test_background_hands_its_failure_over() -> None:
    done: list[int] = []
    with Background() as background:
        for at in range(9):
            background.put(lambda at=at: done.append(at))  # type: ignore[misc]
    assert done == list(range(9))
    background.close()
    with pytest.raises(ZeroDivisionError), Background() as background:
        background.put(lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.put(lambda: done.append(99))
        raise KeyboardInterrupt


def test_ahead_keeps_order_and_hands_failures_over() -> None:
    assert list(Ahead(lambda item: item * 2, [1, 2, 3])) == [(1, 2), (2, 4), (3, 6)]
    with pytest.raises(ZeroDivisionError):
        list(Ahead(lambda item: 1 // item, [1, 0, 1]))


INTERRUPTED_AT_RANDOM = """
import faulthandler, random, signal, time
from predistill.teacher_dump.background import Background

class Stopped(BaseException):
    pass

def stop(*_):
    raise Stopped

signal.signal(signal.SIGALRM, stop)
faulthandler.dump_traceback_later(30, exit=True)
rng, until = random.Random(0), time.monotonic() + 2
while time.monotonic() < until:
    try:
        with Background() as background:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
            for _ in range(400):
                background.put(lambda: None)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Stopped:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_a_signal_at_any_moment_holds_up_nobody() -> None:
    """Some thousand times: a writer whose wake-up was lost would wait, and be waited for, forever."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_AT_RANDOM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
