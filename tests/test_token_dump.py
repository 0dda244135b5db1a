"""Taggers' dumps against the teacher run in the test: pieces and words in their places."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from dump_cases import own_cache, shard_bytes, write  # noqa: F401  a fixture
from predistill.store import ConfigError, DataError, TeacherStore, content_hash
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump, plan
from predistill.teacher_dump.tasks.token_classification import first_tokens
from token_cases import NAMES, firsts, online, sentences, settings, tagger
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def teacher(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagger(tiny_tokenizer_dir, tmp_path_factory.mktemp("taggers") / "teacher")


def test_every_word_is_what_the_teacher_says(teacher: Path, tmp_path: Path) -> None:
    rows = sentences(60)
    rows[7] = {"tokens": ["a", "", "film", "\u200b"], "ner_tags": ["O", "O", "B-film", "O"]}  # two make no tokens
    data = write(tmp_path / "a.jsonl", rows)
    found = dump(settings(teacher, data, tmp_path / "s", shard_size=6000))
    assert found["complete"] and found["splits"]["train"]["shards"] > 2 and verify(tmp_path / "s")["ok"]
    assert found["settings"]["label_column"] == "ner_tags" and found["label_names"] == NAMES
    columns = "teacher_prediction, teacher_confidence, teacher_entropy, teacher_loss, tokens, content_hash"
    with TeacherStore.open(tmp_path / "s") as store:
        stored = store.select()
        index = store.sql(f"SELECT {columns} FROM samples ORDER BY source_index").fetchall()
        for at, row in enumerate(rows):
            logits, words = online(teacher, row["tokens"])
            one, places = stored[at], firsts(words)
            np.testing.assert_allclose(one["teacher_logits"], logits, rtol=1e-5, atol=1e-5)
            assert one["word_ids"].tolist() == [-1 if word is None else word for word in words]
            known = row["ner_tags"] or []
            tags = {places[word]: NAMES.index(tag) for word, tag in enumerate(known) if word in places}
            assert one["labels"].tolist() == [tags.get(place, -100) for place in range(len(words))]
            prediction, confidence, entropy, loss, tokens, hashed = index[at]
            first = logits[list(places.values())]
            best = dict(zip(places, first.argmax(-1).tolist(), strict=True))
            assert prediction == [best.get(word, -100) for word in range(len(row["tokens"]))]
            np.testing.assert_allclose(confidence, first.softmax(-1).amax(-1).mean(), rtol=1e-4)
            entropies = torch.distributions.Categorical(logits=first).entropy()
            np.testing.assert_allclose(entropy, entropies.mean(), rtol=1e-3, atol=1e-5)
            assert tokens == row["tokens"] and hashed == content_hash(row["tokens"]).hex()
            if not tags:
                assert loss is None
                continue
            labels = torch.tensor([tags[place] for place in places.values()])
            np.testing.assert_allclose(loss, torch.nn.functional.cross_entropy(first, labels), rtol=1e-3, atol=1e-5)


def test_what_is_said_of_words(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"tokens": ["film"] * 30, "ner_tags": [0] * 30}, {"tokens": ["film", ""], "pos_tags": [1, 1]}]
    rows = [{"tokens": row["tokens"], "ner_tags": row.get("ner_tags"), "pos_tags": row.get("pos_tags")} for row in rows]
    found = dump(settings(teacher, write(tmp_path / "a.jsonl", rows), tmp_path / "s", max_length=10))
    said = capsys.readouterr().err
    assert "note: 1 of 2 rows were longer than 10 tokens and were cut" in said
    assert "note: the tokenizer makes nothing of 1 words, which have no logits" in said
    assert "tags are those of column ner_tags, not of pos_tags" in said
    assert found["settings"]["max_length"] == 10
    with TeacherStore.open(tmp_path / "s") as store:
        (cut,), (short,) = store.sql("SELECT teacher_prediction FROM samples ORDER BY source_index").fetchall()
    assert len(cut) == 30 and [one == -100 for one in cut] == [at >= 8 for at in range(30)]
    assert short[0] >= 0 and short[1] == -100


@pytest.mark.parametrize("form", ["ids", "names", "class_labels", "large"])
def test_tags_of_any_form(form: str, teacher: Path, tmp_path: Path) -> None:
    rows = sentences(20)
    ids = [row["ner_tags"] and [NAMES.index(tag) for tag in row["ner_tags"]] for row in rows]
    tags = datasets.List({"class_labels": datasets.ClassLabel(names=NAMES), "ids": datasets.Value("int8")}.get(
        form, datasets.Value("string")))  # fmt: skip
    kind = datasets.LargeList if form == "large" else datasets.List
    features = datasets.Features({"words": kind(datasets.Value("large_string")), "tags": tags})
    values = ids if form in ("ids", "class_labels") else [row["ner_tags"] for row in rows]
    made = datasets.Dataset.from_dict({"words": [row["tokens"] for row in rows], "tags": values}, features)
    made.save_to_disk(str(tmp_path / "data"))
    dump(settings(teacher, tmp_path / "data", tmp_path / "s", text_column="words", fields=["logits"]))
    with TeacherStore.open(tmp_path / "s") as store:
        stored = store.select()
        for at, row in enumerate(rows):
            known = stored[at]["labels"]
            assert known[known >= 0].tolist() == (ids[at] or []), row


def test_tags_in_another_order(teacher: Path, tmp_path: Path) -> None:
    other = [NAMES[at] for at in (0, 3, 4, 1, 2)]
    features = datasets.Features({
        "tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=other)),
    })  # fmt: skip
    made = datasets.Dataset.from_dict({"tokens": [["a", "film"]], "ner_tags": [[0, 3]]}, features)
    made.save_to_disk(str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="class 1 is 'B-person' in the dataset and 'B-film' in the teacher's"):
        plan(settings(teacher, tmp_path / "data", tmp_path / "s"))
    dump(settings(teacher, tmp_path / "data", tmp_path / "s", label_order="by-name"))
    with TeacherStore.open(tmp_path / "s") as store:
        assert store.select()[0]["labels"].tolist() == [-100, 0, 1, -100]


CONLL = """-DOCSTART- -X- O O

a DT O
Xylo NNP B-person
film NN O

-DOCSTART- -X- O O

sad\u00a0film JJ B-film

\uff03 .\tO
"""


def test_conll(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(CONLL, encoding="utf-8")
    (tmp_path / "b.bio").write_text("film\nold\n\nsad\n")
    found = dump(settings(teacher, f"train={tmp_path / 'a.conll'},test={tmp_path / 'b.bio'}", tmp_path / "s"))
    assert {split: about["samples"] for split, about in found["splits"].items()} == {"train": 3, "test": 2}
    with TeacherStore.open(tmp_path / "s") as store:
        words = [row[0] for row in store.sql("SELECT tokens FROM samples ORDER BY sample_id").fetchall()]
        labels = store.select(split="train")[[0, 1]]["labels"]
        assert (store.select(split="test")[[0, 1]]["labels"] == -100).all()
    assert words == [["a", "Xylo", "film"], ["sad\u00a0film"], ["\uff03 ."], ["film", "old"], ["sad"]]
    assert labels[0][labels[0] >= 0].tolist() == [0, 3, 0] and labels[1][labels[1] >= 0].tolist() == [1]
    (tmp_path / "a.conll").write_text("old O\n")
    assert plan(settings(teacher, tmp_path / "a.conll", tmp_path / "x"))["samples"] == 1, "not what was read before"


BAD: dict[str, dict[str, Any]] = {
    "column 'ner_tags' has 1 tags for 2 words; one each expected: mend it, or make it null": {"ner_tags": ["O"]},
    "column 'ner_tags' has 0 tags for 2 words": {"ner_tags": []},
    "row 1: column 'ner_tags' is 'B-place'; the teacher's classes are 'O', 'B-film'": {"ner_tags": ["O", "B-place"]},
    "row 1: column 'tokens' is empty; words expected": {"tokens": [], "ner_tags": []},
    "row 1: column 'tokens' is null; words expected": {"tokens": None, "ner_tags": None},
    "row 1: column 'tokens' has a word that is null": {"tokens": ["a", None]},
}


@pytest.mark.parametrize("line", BAD)
def test_bad_rows(line: str, teacher: Path, tmp_path: Path) -> None:
    good = {"tokens": ["a", "film"], "ner_tags": ["O", "B-film"]}
    data = write(tmp_path / "a.jsonl", [good, {**good, **BAD[line]}, good])
    with pytest.raises(DataError, match=f"split train, .*{line}"):
        dump(settings(teacher, data, tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_bad_columns_settings_and_files(teacher: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", [{"tokens": "a film", "ner_tags": "O"}])
    with pytest.raises(DataError, match="column 'tokens': a list of words in each row expected; got string"):
        plan(settings(teacher, text, tmp_path / "s"))
    row = {"tokens": ["a"], "ner_tags": ["O"], "place": [7]}
    data = write(tmp_path / "b.jsonl", [row])
    with pytest.raises(DataError, match="no column 'words'; it has 'tokens', 'ner_tags', 'place'"):
        plan(settings(teacher, data, tmp_path / "s", text_column="words"))
    with pytest.raises(DataError, match="column 'place' is 7; the teacher has 5 classes, so 0 to 4 expected"):
        plan(settings(teacher, data, tmp_path / "s", label_column="place"))
    flat = write(tmp_path / "c.jsonl", [{**row, "text": "O"}])
    with pytest.raises(ConfigError, match="column 'text' holds string; a list of classes expected"):
        plan(settings(teacher, flat, tmp_path / "s", label_column="text"))
    with pytest.raises(ConfigError, match="its weights lack classifier"):
        plan(settings(_headless(teacher, tmp_path), data, tmp_path / "s"))
    with pytest.raises(ConfigError, match="--text-pair-column is nothing that token-classification knows"):
        plan(settings(teacher, data, tmp_path / "s", text_pair_column="b"))
    with pytest.raises(ConfigError, match="--problem-type is nothing that token-classification knows"):
        settings(teacher, data, tmp_path / "s", problem_type="regression")
    (tmp_path / "d.conll").write_text("a O\nfilm\n")
    with pytest.raises(DataError, match="d.conll, line 2: a tag on every line .* expected; got a token and no tag"):
        plan(settings(teacher, tmp_path / "d.conll", tmp_path / "s"))
    (tmp_path / "e.conll").write_text("-DOCSTART- O\n\n")
    with pytest.raises(DataError, match="e.conll has no sentences; at least one expected"):
        plan(settings(teacher, tmp_path / "e.conll", tmp_path / "s"))


def _headless(teacher: Path, tmp_path: Path) -> Path:
    from transformers import AutoModel

    folder = tmp_path / "headless"
    AutoModel.from_pretrained(teacher).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


def test_names_of_generic_teachers(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    plain = tagger(tiny_tokenizer_dir, tmp_path / "t", [f"LABEL_{at}" for at in range(5)])
    data = write(tmp_path / "a.jsonl", sentences(5))
    with pytest.raises(ConfigError, match="config names no classes: give --label-names"):
        plan(settings(plain, data, tmp_path / "s"))
    assert dump(settings(plain, data, tmp_path / "s", label_names=NAMES))["label_names"] == NAMES


def test_a_tokenizer_of_running_text(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    data = write(tmp_path / "a.jsonl", sentences(5))
    for prefix in (False, True):
        backend = Tokenizer(models.BPE({one: at for at, one in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        folder = tagger(teacher, tmp_path / str(prefix), vocab_size=300)
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!", model_max_length=64).save_pretrained(folder)
        plan(settings(folder, data, tmp_path / "s"))
        assert ("makes other tokens of separate words" in capsys.readouterr().err) != prefix


def test_inside_and_rows_alike_whatever_the_batches(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sentences(30))
    inner = {"fields": ["logits", "hidden_states", "attentions"], "layers": "0,2"}
    for tokens in (1, 10**6):
        dump(settings(teacher, data, tmp_path / str(tokens), tokens_per_batch=tokens, **inner))
    stores = [TeacherStore.open(tmp_path / name) for name in ("1", "1000000")]
    for name in ("teacher_logits", "teacher_hidden_states_02", "word_ids"):
        one, other = (store.select()[list(range(30))][name] for store in stores)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert stores[0].select()[[0]]["teacher_attentions_01"].shape[1] == 2
    alone = dump(settings(teacher, data, tmp_path / "inner", fields=["hidden_states"]))
    assert "teacher_logits" not in alone["fields"] and "word_ids" in alone["fields"]


KILLED = """
    import json, sys
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump
    from predistill.store.shared import SharedWriter
    commit, done = SharedWriter.commit, []
    def commit_some(self, builder):
        import os, signal
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return commit(self, builder)
    SharedWriter.commit = commit_some
    dump(DumpConfig(**json.loads(sys.argv[1])))
"""


def test_a_killed_dump_goes_on(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sentences(60))
    given = {"teacher": str(teacher), "dataset": str(data), "task": "token-classification", "dtype": "float32",
             "device": "cpu", "shard_size": 6000, "tokens_per_batch": 256}  # fmt: skip
    killed = json.dumps({**given, "output_dir": str(tmp_path / "s")})
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), killed], capture_output=True)
    assert done.returncode == -9 and len(shard_bytes(tmp_path / "s")) == 2
    dump(settings(teacher, data, tmp_path / "s", shard_size=6000))
    dump(settings(teacher, data, tmp_path / "whole", shard_size=6000))
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "whole") and verify(tmp_path / "s")["ok"]


def test_first_tokens() -> None:
    words = np.array([-1, 0, 0, 1, -1, 1, 2, 2])  # rows of 5 and 3: the second begins with word 1 of its own
    assert first_tokens(words, np.array([5, 3])).astype(int).tolist() == [0, 1, 0, 1, 0, 1, 1, 0]


def test_wnut17(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    kinds = ("corporation", "creative-work", "group", "location", "person", "product")
    names = ["O", *(f"{part}-{kind}" for kind in kinds for part in "BI")]
    data = f"validation={data_dir / 'wnut17' / 'validation.jsonl.gz'}"
    found = dump(settings(tagger(teacher, tmp_path / "t", names), data, tmp_path / "s", dtype="float16"))
    assert found["splits"]["validation"]["samples"] == 1009 and verify(tmp_path / "s")["ok"]
    query = "SELECT sum(len(tokens)), sum(len(list_filter(teacher_prediction, lambda x: x >= 0))) FROM samples"
    with TeacherStore.open(tmp_path / "s") as store:
        (words, said), *_ = store.sql(query).fetchall()
    assert 10_000 < said < words
