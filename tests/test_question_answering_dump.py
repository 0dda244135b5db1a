"""Questions dumped: windows as transformers prepares them, logits as the teacher gives them, files of every form."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from dump_cases import own_cache, shard_bytes  # noqa: F401  a fixture
from predistill.store import ConfigError, DataError, TeacherStore
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump, plan
from question_cases import LENGTH, articles, features, online, reader, settings, squad, write
from transformers import AutoTokenizer

ROWS = squad(40, impossible=True)


@pytest.fixture(scope="module")
def teacher(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reader(tiny_tokenizer_dir, tmp_path_factory.mktemp("reader"))


def stored(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with their arrays, and rows of the index."""
    with TeacherStore.open(folder) as store:
        rows = store.select()
        return [rows[at] for at in range(len(rows))], store.sql("SELECT * FROM samples").to_arrow_table().to_pylist()


def test_every_window_is_what_the_teacher_says(teacher: Path, tmp_path: Path) -> None:
    found = dump(settings(teacher, write(tmp_path / "a.jsonl", ROWS), tmp_path / "s", shard_size=30_000))
    assert found["complete"] and found["splits"]["train"]["shards"] > 2 and verify(tmp_path / "s")["ok"]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    windows = [{**one, "row": at, "view": view} for at, row in enumerate(ROWS)
               for view, one in enumerate(features(tokenizer, row))]  # fmt: skip
    rows, index = stored(tmp_path / "s")
    assert len(rows) == len(windows) > len(ROWS) and max(len(one["input_ids"]) for one in windows) == LENGTH
    logits = online(teacher, windows)
    for row, said, window, (start, end) in zip(rows, index, windows, logits, strict=True):
        assert row["input_ids"].tolist() == window["input_ids"] and row["offsets"].tolist() == window["offsets"]
        assert row["token_type_ids"].tolist() == window["token_type_ids"]
        assert (row["start_positions"], row["end_positions"]) == (window["start"], window["end"])
        np.testing.assert_allclose(row["teacher_start_logits"], start, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(row["teacher_end_logits"], end, rtol=1e-5, atol=1e-5)
        source = ROWS[window["row"]]
        assert (said["source_index"], said["view"]) == (window["row"], window["view"])
        assert said["id"] == source["id"] and said["question"] == source["question"]
        assert (said["context"], said["answers"]) == (
            (None,) * 2 if window["view"] else (source["context"], source["answers"])
        )
        both = [torch.distributions.Categorical(logits=one) for one in (start, end)]
        assert said["teacher_prediction"] == [int(start.argmax()), int(end.argmax())]
        assert said["teacher_confidence"] == pytest.approx(np.mean([one.probs.max() for one in both]), rel=1e-4)
        assert said["teacher_entropy"] == pytest.approx(np.mean([one.entropy() for one in both]), rel=1e-4)
        losses = [
            -one.log_prob(torch.tensor(at)) for one, at in zip(both, (window["start"], window["end"]), strict=True)
        ]
        assert said["teacher_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    inside = [row for row in rows if row["start_positions"] > 0]
    assert len(inside) > 15 and len({one["content_hash"] for one in index}) == len(index)
    for row, said in zip(rows, index, strict=True):
        if at := int(row["start_positions"]):
            source = ROWS[said["source_index"]]
            text = source["context"][row["offsets"][at][0] : row["offsets"][int(row["end_positions"])][1]]
            assert text == source["answers"]["text"][0]


@pytest.mark.parametrize("form", ["v1.1", "v2.0", "folder", "gzip", "hub", "objects"])
def test_the_same_questions_in_every_form(form: str, teacher: Path, tmp_path: Path) -> None:
    rows = [one for one in ROWS if one["answers"]["text"]] if form == "v1.1" else ROWS
    reference = write(tmp_path / "a.jsonl", rows)
    folder = tmp_path / "data"
    folder.mkdir()
    if form in ("v1.1", "v2.0"):
        data = write(folder / "train.json", articles(rows, form))
    elif form == "folder":
        write(folder / "train.json", articles(rows, "v2.0"))
        data = folder
    elif form == "gzip":
        data = folder / "train.json.gz"
        data.write_bytes(gzip.compress(json.dumps(articles(rows, "v2.0")).encode()))
    elif form == "hub":
        datasets.Dataset.from_list(rows).save_to_disk(folder)
        data = folder
    else:  # as older libraries wrote the Hub's
        flat = [qa["qas"][0]["answers"] for one in articles(rows)["data"] for qa in one["paragraphs"]]
        lines = [{**row, "answers": answers} for row, answers in zip(rows, flat, strict=True)]
        data = write(folder / "train.jsonl", lines)
    for name, source in (("a", reference), ("b", data)):
        dump(settings(teacher, source, tmp_path / name))
    (left, said), (right, also) = (stored(tmp_path / name) for name in ("a", "b"))
    assert said == also and len(said) >= len(rows)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one if isinstance(one[name], np.ndarray))


def test_other_columns_and_rows_without_labels(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"q": row["question"], "passage": row["context"], "gold": row["answers"]} for row in ROWS]
    for row in rows[::2]:
        row["gold"] = None
    data = write(tmp_path / "a.jsonl", rows)
    named = {"text_column": "q", "text_pair_column": "passage"}
    dump(settings(teacher, data, tmp_path / "s", **named, label_column="gold"))
    found, index = stored(tmp_path / "s")
    for row, said in zip(found, index, strict=True):
        unlabelled = said["source_index"] % 2 == 0
        assert (row["start_positions"] == -100) == unlabelled == (said["teacher_loss"] is None)
        assert said["id"] == str(said["source_index"])
    dump(settings(teacher, data, tmp_path / "t", **named))
    assert "no column of answers" in capsys.readouterr().err
    assert all(row["end_positions"] == -100 for row in stored(tmp_path / "t")[0])


def test_an_empty_context_and_defaults(teacher: Path, tmp_path: Path) -> None:
    rows = [{"question": "what?", "context": "", "answers": {"text": [], "answer_start": []}}, ROWS[0]]
    data = write(tmp_path / "a.jsonl", rows)
    made = dump(settings(teacher, data, tmp_path / "s", max_length=None, doc_stride=None))
    assert (made["settings"]["max_length"], made["settings"]["doc_stride"]) == (64, 21)
    first = stored(tmp_path / "s")[0][0]
    assert (first["offsets"] == -1).all() and first["start_positions"] == 0


def test_what_is_inside_the_teacher(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ROWS[:6])
    dump(settings(teacher, data, tmp_path / "s", fields=["logits", "hidden_states", "attentions"]))
    dump(settings(teacher, data, tmp_path / "t", fields=["hidden_states"], layers="2"))
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(teacher, attn_implementation="eager").eval()
    for row, alone in zip(stored(tmp_path / "s")[0], stored(tmp_path / "t")[0], strict=True):
        inputs = {name: torch.from_numpy(row[name]).long()[None] for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        for name, own in (("hidden_states_02", outputs.hidden_states[2]), ("attentions_01", outputs.attentions[1])):
            np.testing.assert_allclose(row[f"teacher_{name}"], own[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            alone["teacher_hidden_states_02"], row["teacher_hidden_states_02"], rtol=1e-4, atol=1e-5
        )
        assert "teacher_start_logits" not in alone and "offsets" in alone


def test_a_dump_that_was_stopped_goes_on(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from predistill.teacher_dump import shards

    config = settings(teacher, write(tmp_path / "a.jsonl", ROWS), tmp_path / "s", shard_size=20_000)
    commit, left = shards.ShardKeeper.commit, [2]

    def dying(self: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        commit(self)

    monkeypatch.setattr(shards.ShardKeeper, "commit", dying)
    with pytest.raises(KeyboardInterrupt):
        dump(config)
    assert len(shard_bytes(tmp_path / "s")) == 2 and not (tmp_path / "s" / "store.json").exists()
    monkeypatch.setattr(shards.ShardKeeper, "commit", commit)
    assert dump(config)["complete"] and verify(tmp_path / "s")["ok"]
    shutil.move(tmp_path / "s", tmp_path / "first")
    dump(config)
    whole = shard_bytes(tmp_path / "s")
    assert len(whole) > 3 and whole == shard_bytes(tmp_path / "first")


# ---- what is refused ----


def changed(**more: Any) -> list[dict[str, Any]]:
    return [*ROWS[:3], {**ROWS[3], **more}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(answers={"text": ["film"], "answer_start": [10_000]}), r"3 \(id q0-3\): answer 'film' expected at"),
        (changed(answers={"text": ["nowhere"], "answer_start": [0]}), "'nowhere' expected at character 0 of the"),
        (changed(answers={"text": [ROWS[3]["context"][4:9]], "answer_start": [3]}), "it stands at 4: mend the answer"),
        (changed(answers={"text": [""], "answer_start": [0]}), "answer '' expected at character 0"),
        (changed(answers={"text": ["a"], "answer_start": [-1]}), r"q0-3\): answer 'a' expected at character -1"),
        (changed(answers={"text": ["a", "b"], "answer_start": [0]}), "as many texts as starts expected"),
        (changed(context=None), "row 3: column 'context' is null"),
        (changed(question=""), "row 3: column 'question' is empty"),
        (changed(question="x " * 60), r"\(id q0-3\): a question of at most 28 tokens expected, .* it has 60"),
        ([{"question": "a", "text": "b"}], "no column 'context'; it has 'question', 'text'"),
        (articles(changed(answers={"text": ["nowhere"], "answer_start": [0]})), r"\(id q0-3\): answer 'nowhere'"),
        ({"version": "1", "data": [{"title": "t", "paragraphs": [{"qas": []}]}]}, r"0 \(t\), paragraph 0: 'context'"),
        ({"version": "1", "data": [{"title": "t", "paragraphs": []}]}, "a question in a paragraph of an article"),
    ],
)  # fmt: skip
def test_bad_questions(rows: Any, message: str, teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / ("a.jsonl" if isinstance(rows, list) else "a.json"), rows)
    with pytest.raises(DataError, match=message) as found:
        plan(settings(teacher, data, tmp_path / "s"))
    assert "\n" not in str(found.value)


def test_bad_settings(teacher: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match="--doc-stride 36: windows of 40 tokens .* share at most 35"):
        plan(settings(teacher, data, tmp_path / "s", doc_stride=36))
    with pytest.raises(ConfigError, match="--doc-stride is nothing that text-classification knows"):
        settings(teacher, data, tmp_path / "s", task="text-classification")
    with pytest.raises(ConfigError, match="is a BertForSequenceClassification; --task question-answering needs"):
        dump(settings(tiny_teacher_dir, data, tmp_path / "s"))
    shutil.copytree(teacher, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.cls_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"inputs begin with '\[SEP\]' expected"):
        plan(settings(tmp_path / "other", data, tmp_path / "s"))


@pytest.mark.slow
def test_real_questions(tiny_tokenizer_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """Answers of real articles are found again from the stored offsets."""
    whole = json.loads((data_dir / "squad" / "validation.json").read_text())
    data = write(tmp_path / "train.json", {**whole, "data": whole["data"][:6]})
    teacher = reader(tiny_tokenizer_dir, tmp_path / "t", layers=1, max_position_embeddings=384)
    sizes = {"max_length": 384, "doc_stride": 64, "tokens_per_batch": 8192}  # a tiny tokenizer: most tokens are letters
    found = dump(settings(teacher, data, tmp_path / "s", **sizes))
    real = [qa for one in json.loads(data.read_text())["data"] for text in one["paragraphs"] for qa in text["qas"]]
    assert found["samples"] > len(real) and verify(tmp_path / "s")["ok"]
    with TeacherStore.open(tmp_path / "s") as store:
        rows = store.select()
        kept = rows.column("start_positions") > 0
        index = store.sql("SELECT id, context, answers, source_index, view FROM samples ORDER BY sample_id").fetchall()
        texts = {row[3]: (row[1], row[2]["text"][0]) for row in index if row[4] == 0}
        assert len(texts) == len(real)
        seen = {}
        for at in np.flatnonzero(kept):
            row, (context, answer) = rows[int(at)], texts[index[at][3]]
            text = context[row["offsets"][row["start_positions"]][0] : row["offsets"][row["end_positions"]][1]]
            seen[index[at][3]] = answer in text and len(text) <= len(answer) + 8
    assert len(seen) > 0.9 * len(real) and np.mean(list(seen.values())) > 0.99
