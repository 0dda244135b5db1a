"""The dump against a teacher run in the test: the same rows in the same places, with what the teacher says of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from dump_cases import (
    bert,
    online,
    own_cache,  # noqa: F401  a fixture
    rows,
    saved,
    settings,
    shard_bytes,
    texts,
    write,
)
from predistill.store import (
    ConfigError,
    FieldSpec,
    TeacherStore,
    content_hash,
)
from predistill.store.verify import verify
from predistill.teacher_dump.capture import token_batches
from predistill.teacher_dump.dump import dump, plan
from predistill.teacher_dump.planning import Pilot, plan_shards
from predistill.teacher_dump.teachers.teacher import Teacher, slow_dtype
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)


def test_every_row_is_what_the_teacher_says(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    train, test = rows(300, note=lambda at: {"at": at, "tags": [str(at)]}), rows(40, seed=1)
    for row in train[::5]:
        row["label"] = (None, -1, -100)[row["note"]["at"] % 3]
    data = f"train={write(tmp_path / 'a.jsonl', train)},test={write(tmp_path / 'b.jsonl', test)}"
    found = dump(
        settings(
            tiny_teacher_dir,
            data,
            tmp_path / "store",
            split=["train"],
            keep_columns=["text", "note"],
            shard_size=30_000,
        )
    )
    assert found["complete"] and found["splits"]["train"]["samples"] == 300 and found["splits"]["train"]["shards"] > 2
    assert found["seconds"] >= found["teacher_seconds"] > 0 and found["tokens_per_second"] > 0
    assert verify(tmp_path / "store")["ok"]

    expected = np.stack(online(tiny_teacher_dir, [row["text"] for row in train]))
    labels = np.array([row["label"] if row["label"] in (0, 1) else -100 for row in train])
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
    with TeacherStore.open(tmp_path / "store") as store:
        stored = store.select(split="train")
        np.testing.assert_allclose(stored.column("teacher_logits"), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(stored.column("labels"), labels)
        for at in (0, 7, 299):
            ids = tokenizer(train[at]["text"], truncation=True, max_length=64)["input_ids"]
            assert stored[at]["input_ids"].tolist() == ids
        index = store.sql("SELECT * FROM samples ORDER BY source_index").fetchall()
        names = store.sql("SELECT * FROM samples LIMIT 0").columns
    logits = torch.from_numpy(expected)
    logprobs, known = logits.log_softmax(-1), torch.from_numpy(labels)
    by_name = {name: [row[at] for row in index] for at, name in enumerate(names)}
    assert by_name["teacher_prediction"] == logits.argmax(-1).tolist()
    np.testing.assert_allclose(by_name["teacher_confidence"], logprobs.exp().amax(-1), rtol=1e-4)
    np.testing.assert_allclose(
        by_name["teacher_entropy"], torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-3, atol=1e-5
    )
    losses = torch.nn.functional.cross_entropy(logits, known, reduction="none")
    assert [loss is None for loss in by_name["teacher_loss"]] == (known < 0).tolist()
    np.testing.assert_allclose(
        [x for x in by_name["teacher_loss"] if x is not None], losses[known >= 0], rtol=1e-3, atol=1e-5
    )
    assert by_name["content_hash"][3] == content_hash([train[3]["text"]]).hex()
    assert [row["text"] for row in train] == by_name["text"] and by_name["note"][5] == train[5]["note"]


def test_pairs(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    first, second = texts(60), texts(60, seed=5)
    data = write(tmp_path / "a.jsonl", [{"q": a, "d": b} for a, b in zip(first, second, strict=True)])
    found = dump(settings(tiny_teacher_dir, data, tmp_path / "s", text_column="q", text_pair_column="d", max_length=32))
    assert found["settings"]["label_column"] is None and found["settings"]["max_length"] == 32
    with TeacherStore.open(tmp_path / "s") as store:
        stored = store.select()
        np.testing.assert_allclose(
            stored.column("teacher_logits"),
            np.stack(online(tiny_teacher_dir, first, second, max_length=32)),
            rtol=1e-5,
            atol=1e-5,
        )
        assert (stored.column("labels") == -100).all() and stored.lengths.max() == 32
        assert set(stored[0]["token_type_ids"].tolist()) == {0, 1}
        assert stored[1]["teacher_logits"].shape == (2,)
        hashes = store.sql("SELECT content_hash FROM samples ORDER BY source_index").fetchall()
    assert hashes[4][0] == content_hash([first[4], second[4]]).hex()


def test_multi_label(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = bert(tiny_tokenizer_dir, tmp_path / "t", num_labels=3, problem_type="multi_label_classification")
    labels = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], None]
    data = write(tmp_path / "a.jsonl", [{"text": text, "labels": labels[at % 3]} for at, text in enumerate(texts(45))])
    found = dump(settings(teacher, data, tmp_path / "s", shard_size=3000))
    assert found["settings"]["problem_type"] == "multi_label_classification"
    logits = torch.from_numpy(np.stack(online(teacher, texts(45))))
    probs = logits.sigmoid()
    with TeacherStore.open(tmp_path / "s") as store:
        stored = store.select()
        np.testing.assert_allclose(stored.column("teacher_logits"), logits, rtol=1e-5, atol=1e-5)
        expected = np.array([labels[at % 3] or [np.nan] * 3 for at in range(45)], np.float32)
        np.testing.assert_array_equal(stored.column("labels"), expected)
        columns = "teacher_prediction, teacher_confidence, teacher_entropy, teacher_loss"
        query = f"SELECT {columns} FROM samples ORDER BY source_index"
        predictions, confidences, entropies, losses = zip(*store.sql(query).fetchall(), strict=True)
    assert list(predictions) == [row.nonzero().flatten().tolist() for row in probs > 0.5]
    np.testing.assert_allclose(confidences, torch.maximum(probs, 1 - probs).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(
        entropies, torch.distributions.Bernoulli(logits=logits).entropy().sum(-1), rtol=1e-3, atol=1e-5
    )
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(expected).nan_to_num(), reduction="none"
    )
    assert [loss is None for loss in losses] == [at % 3 == 2 for at in range(45)]
    np.testing.assert_allclose(
        [x for x in losses if x is not None], bce.mean(-1)[np.arange(45) % 3 < 2], rtol=1e-3, atol=1e-5
    )


def test_regression(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = bert(tiny_tokenizer_dir, tmp_path / "t", num_labels=1)
    data = write(tmp_path / "a.jsonl", rows(20, label=lambda at: None if at == 3 else at / 2 - 1))
    found = dump(settings(teacher, data, tmp_path / "s"))
    assert found["settings"]["problem_type"] == "regression" and found["label_names"] is None
    logits = np.stack(online(teacher, texts(20)))
    with TeacherStore.open(tmp_path / "s") as store:
        labels = store.select().column("labels")
        np.testing.assert_allclose(store.select().column("teacher_logits"), logits, rtol=1e-5, atol=1e-5)
        found_rows = store.sql(
            "SELECT teacher_prediction, teacher_confidence, teacher_loss FROM samples ORDER BY source_index"
        ).fetchall()
    assert labels.dtype == np.float32 and labels[2] == 0 and np.isnan(labels[3])
    np.testing.assert_allclose([row[0] for row in found_rows], logits[:, 0], rtol=1e-5, atol=1e-5)
    assert all(row[1] is None for row in found_rows) and found_rows[3][2] is None
    np.testing.assert_allclose(found_rows[2][2], logits[2, 0] ** 2, rtol=1e-3)
    with pytest.raises(ConfigError, match="gives 1 numbers a row, which does not suit single_label"):
        plan(settings(teacher, data, tmp_path / "s", problem_type="single_label_classification"))


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_other_architectures(family: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    vocab = len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    torch.manual_seed(2)
    if family == "gpt2":  # pads on the right, reads the last token
        model: Any = GPT2ForSequenceClassification(
            GPT2Config(  # type: ignore[call-arg]
                vocab_size=vocab,
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=48,
                initializer_range=0.5,
                num_labels=3,
                pad_token_id=0,
            )
        )
    else:  # counts positions from its padding id: 50 positions hold 49 tokens
        model = RobertaForSequenceClassification(
            RobertaConfig(  # type: ignore[call-arg]
                vocab_size=vocab,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                num_labels=3,
                max_position_embeddings=49,
                pad_token_id=0,
                type_vocab_size=2,
                initializer_range=0.5,
            )
        )
    teacher = saved(model, tiny_tokenizer_dir, tmp_path / "t")
    found = dump(settings(teacher, write(tmp_path / "a.jsonl", rows(80)), tmp_path / "s"))
    assert found["settings"]["max_length"] == 48
    with TeacherStore.open(tmp_path / "s") as store:
        np.testing.assert_allclose(
            store.select().column("teacher_logits"),
            np.stack(online(teacher, texts(80), max_length=48)),
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_same_rows_whatever_the_batches(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(120))
    logits = []
    for tokens in (1, 100, 10**6):
        dump(settings(tiny_teacher_dir, data, tmp_path / str(tokens), tokens_per_batch=tokens))
        with TeacherStore.open(tmp_path / str(tokens)) as store:
            logits.append(store.select().column("teacher_logits"))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[0], logits[2], rtol=1e-5, atol=1e-5)


def test_bytes_depend_on_content_and_not_on_places(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", rows(150))
    dump(settings(tiny_teacher_dir, data, tmp_path / "one", shard_size=8000))
    moved = tmp_path / "elsewhere" / tiny_teacher_dir.name
    shutil.copytree(tiny_teacher_dir, moved)
    (tmp_path / "else").mkdir()
    dump(settings(moved, shutil.copy(data, tmp_path / "else" / data.name), tmp_path / "two", shard_size="8kB"))
    first, second = shard_bytes(tmp_path / "one"), shard_bytes(tmp_path / "two")
    assert len(first) > 2 and first == second
    assert str(tmp_path).encode() not in b"".join(first.values()) + (tmp_path / "one" / "store.json").read_bytes()


def test_done_is_done_without_loading_the_teacher(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", rows(50)), tmp_path / "s")
    dump(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.is_file()}
    monkeypatch.setattr(Teacher, "load", lambda self: pytest.fail("the teacher was loaded"))
    assert dump(config)["complete"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.is_file()}


def test_shards_are_ranges_of_near_equal_size() -> None:
    class Source:
        splits = {"train": range(1001), "test": range(7)}

    class Small:
        device, parameters = torch.device("cpu"), 1

    class Huge:
        device, parameters = torch.device("cpu"), 10**9

    pilot = Pilot("train", None, tokens=100, bytes=100, carried=0)  # type: ignore[arg-type]
    shards = plan_shards(Source(), pilot, 30_000, Small())  # type: ignore[arg-type]
    assert [shard.name for shard in shards] == [
        "train-00000",
        "train-00001",
        "train-00002",
        "train-00003",
        "test-00000",
    ]
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 250), (250, 500), (500, 750), (750, 1001), (0, 7)]
    work = plan_shards(Source(), pilot, 10**12, Huge())  # type: ignore[arg-type]
    assert max(shard.stop - shard.start for shard in work) <= 100  # 2e13 operations at 2e9 a token


@pytest.mark.parametrize("tokens", [1, 7, 64, 10**6])
def test_token_batches_hold_every_row_once(tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    batches = list(token_batches(lengths, tokens))
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(batch) == 1 or lengths[batch].max() * len(batch) <= tokens for batch in batches)
    assert np.all(np.diff(lengths[np.concatenate(batches)]) <= 0)


def test_long_text_is_cut_and_counted(
    tiny_teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", [*rows(4), {"text": "word " * 200_000, "label": 1}, {"text": "", "label": 0}])
    found = dump(settings(tiny_teacher_dir, data, tmp_path / "s"))
    assert found["complete"]
    output = capsys.readouterr()
    assert output.out == "" and "1 of 6 rows were longer than 64 tokens and were cut" in output.err
    with TeacherStore.open(tmp_path / "s") as store:
        assert store.select().lengths[4:].tolist() == [64, 2]


def test_label_names_and_their_order(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["Positive", "Negative"])
    )
    datasets.Dataset.from_list(rows(20), features).save_to_disk(tmp_path / "data")
    with pytest.raises(
        ConfigError, match="class 0 is 'Positive' in the dataset and 'negative' in the teacher's id2label"
    ):
        dump(settings(tiny_teacher_dir, tmp_path / "data", tmp_path / "s"))
    found = dump(settings(tiny_teacher_dir, tmp_path / "data", tmp_path / "s", label_order="by-name"))
    assert found["label_names"] == ["negative", "positive"]
    with TeacherStore.open(tmp_path / "s") as store:
        assert store.select().column("labels").tolist() == [1 - at % 2 for at in range(20)]
    words = write(tmp_path / "a.jsonl", rows(20, label=lambda at: ["negative", "positive"][at % 2]))
    dump(settings(tiny_teacher_dir, words, tmp_path / "t"))
    with TeacherStore.open(tmp_path / "t") as store:
        assert store.select().column("labels").tolist() == [at % 2 for at in range(20)]


def test_bfloat16_and_float16_teachers(
    tiny_teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", rows(30))
    expected = np.stack(online(tiny_teacher_dir, texts(30)))
    for dtype in ("bfloat16", "float16"):
        dump(settings(tiny_teacher_dir, data, tmp_path / dtype, teacher_dtype=dtype, dtype=dtype))
        slow = slow_dtype(getattr(torch, dtype), torch.device("cpu"))
        assert ("many times slower" in capsys.readouterr().err) == (slow is not None)
        with TeacherStore.open(tmp_path / dtype) as store:
            stored = store.select()
            assert stored.specs[0].name == "input_ids" and store.fields["teacher_logits"].dtype == dtype
            np.testing.assert_allclose(stored.column("teacher_logits").astype(np.float32), expected, rtol=0.1, atol=0.2)


def test_the_card_reads_the_store(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    dump(settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", rows(30)), tmp_path / "s"))
    card = (tmp_path / "s" / "README.md").read_text()
    for words in (
        "BertForSequenceClassification",
        "negative, positive",
        "| train | 30 |",
        "| teacher_logits | 2 | float32",
        "a.jsonl",
    ):
        assert words in card
    assert (
        datasets.Dataset.from_parquet(str(tmp_path / "s" / "samples.parquet"), cache_dir=str(tmp_path / "c")).num_rows
        == 30
    )
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 4
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(map(textwrap.dedent, blocks))],
        cwd=tmp_path / "s",
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sst2", "ag_news"])
def test_real_rows(name: str, data_dir: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """A part of each real dataset, through a random teacher with as many classes."""
    import gzip

    source = data_dir / name / "train.jsonl.gz"
    with gzip.open(source, "rt") as lines:
        content = [json.loads(line) for _, line in zip(range(1500), lines, strict=False)]
    classes = 4 if name == "ag_news" else 2
    teacher = bert(tiny_tokenizer_dir, tmp_path / "t", num_labels=classes)
    found = dump(
        settings(teacher, write(tmp_path / "a.jsonl", content), tmp_path / "s", tokens_per_batch=4096, dtype="float16")
    )
    assert found["samples"] == 1500 and verify(tmp_path / "s")["ok"]
    at = np.random.default_rng(0).choice(1500, 100, replace=False)
    expected = np.stack(online(teacher, [content[row]["text"] for row in at]))
    with TeacherStore.open(tmp_path / "s") as store:
        assert isinstance(store.fields["teacher_logits"], FieldSpec)
        stored = store.select()
        np.testing.assert_allclose(stored.column("teacher_logits")[at], expected, rtol=2**-10, atol=1e-3)
        assert stored.column("labels").tolist() == [row["label"] for row in content]


def test_what_a_dead_worker_held_goes_with_the_next_dump(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    """Killed between store.json and giving its lease back, a worker leaves a whole store and a file."""
    config = settings(tiny_teacher_dir, write(tmp_path / "a.jsonl", rows(5)), tmp_path / "s")
    dump(config)
    left = tmp_path / "s" / "shards" / "store.lease"
    left.touch()
    assert verify(tmp_path / "s")["ok"]
    dump(config)
    assert not left.exists()
