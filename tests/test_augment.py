"""What `augment` writes, against a masked language model run one word at a time."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from augment_cases import likeliest, own_cache, read_lines, save_masked_lm, settings, squad  # noqa: F401
from conftest import TEXTS
from dump_cases import settings as dump_settings
from dump_cases import write
from predistill.store import TeacherStore
from predistill.teacher_dump.augment import augment
from predistill.teacher_dump.augmentation import masked_lm as masked
from predistill.teacher_dump.augmentation import parts
from predistill.teacher_dump.augmentation.rewrite import View, views
from predistill.teacher_dump.augmentation.words import text_passage
from predistill.teacher_dump.dump import dump

ROWS = [{"text": text, "label": at % 2} for at, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_masked_lm(tiny_tokenizer_dir, tmp_path_factory.mktemp("masked_lm"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", ROWS)


def test_rows_first_then_views_of_each_in_order(model: Path, source: Path, tmp_path: Path) -> None:
    found = augment(settings(model, source, tmp_path / "out.jsonl", multiplication_factor=4))
    made = read_lines(tmp_path / "out.jsonl")
    assert [{**row, "augmented_from": at, "augmentation": 0} for at, row in enumerate(ROWS)] == made[: len(ROWS)]
    rest = [(row["augmented_from"], row["augmentation"]) for row in made[len(ROWS) :]]
    assert rest == sorted(set(rest)) and {view for _, view in rest} == {1, 2, 3, 4}
    assert all(row["label"] == ROWS[row["augmented_from"]]["label"] for row in made)
    assert len({row["text"] for row in made}) == len(made)
    assert found["rows"] == len(made) == found["original_rows"] + found["augmented_rows"]
    assert found["repeated"] == 4 * len(ROWS) - found["augmented_rows"]


def test_replacements_are_the_likeliest_words(model: Path, source: Path, tmp_path: Path) -> None:
    """Every word replaced, by any of 4 candidates: all of those that the model alone gives, and no others."""
    augment(settings(model, source, tmp_path / "out.jsonl", replace_probability=1.0, candidates=4,
                     multiplication_factor=60))  # fmt: skip
    made = read_lines(tmp_path / "out.jsonl")
    for number in (0, 2, 5):
        text = TEXTS[number]
        found = [row["text"].split() for row in made[len(ROWS) :] if row["augmented_from"] == number]
        assert len(found) > 50
        for at, word in enumerate(text.split()):
            if text.split().count(word) == 1 and word.isalpha():
                assert {words[at] for words in found} == likeliest(model, text, word, 4), (text, word)


@pytest.mark.parametrize("more", [{"tokens_per_batch": 1}, {"tokens_per_batch": 37}, {"part_words": 10**6}])
def test_batches_and_parts_change_nothing(model: Path, source: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    augment(settings(model, source, tmp_path / "a.jsonl"))
    augment(settings(model, source, tmp_path / "b.jsonl", **more))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_near_ties_are_decided_by_the_row_alone(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise on every logit of a batch, which is larger than rounding, rows come out as without."""
    augment(settings(model, source, tmp_path / "a.jsonl"))
    logits, rng, alone = masked.MaskedLM._logits, np.random.default_rng(0), 0

    def noisy(self: Any, ids: Any, mask: Any, places: Any) -> Any:
        nonlocal alone
        alone += len(ids) == 1
        found = logits(self, ids, mask, places)
        return found if len(ids) == 1 else found + found.new_tensor(rng.uniform(-0.04, 0.04, found.shape))

    monkeypatch.setattr(masked.MaskedLM, "_logits", noisy)
    monkeypatch.setattr(masked, "MARGIN", 0.1)
    augment(settings(model, source, tmp_path / "b.jsonl"))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert alone > 1


def test_seeds_differ_and_factors_agree(model: Path, source: Path, tmp_path: Path) -> None:
    def views_of(name: str, **more: Any) -> dict[tuple[int, int], str]:
        augment(settings(model, source, tmp_path / name, **more))
        return {(row["augmented_from"], row["augmentation"]): row["text"] for row in read_lines(tmp_path / name)}

    few, many = views_of("few.jsonl", multiplication_factor=2), views_of("many.jsonl", multiplication_factor=9)
    assert few.items() <= many.items()
    assert views_of("other.jsonl", multiplication_factor=2, seed=7) != few


def test_long_texts_are_seen_through_a_window(model: Path, tmp_path: Path) -> None:
    """A word in the middle of 500 others gets the candidates of what stands around it."""
    words = " ".join(TEXTS * 15).replace(",", "").split()
    source = write(tmp_path / "long.jsonl", [{"text": " ".join(words)}])
    augment(settings(model, source, tmp_path / "out.jsonl", replace_probability=1.0, candidates=3, max_length=12,
                     multiplication_factor=40))  # fmt: skip
    made = [row["text"].split() for row in read_lines(tmp_path / "out.jsonl")[1:]]
    assert {len(one) for one in made} == {len(words)}
    at = next(at for at in range(300, 400) if words[at - 5 : at + 5].count(words[at]) == 1)
    around = " ".join(words[at - 5 : at + 5])  # 10 tokens and two that are special
    assert {one[at] for one in made} == likeliest(model, around, words[at], 3)


def test_words_in_pieces_get_their_nearest(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "the Zebra"}, {"text": "the zq"}])
    (tmp_path / "v.txt").write_text("zebra 1 0\nhorse 0.9 0.1\nDonkey 0.8 0.3\nstone 0 1\nrock -1 1\n")
    more = {"replace_probability": 1.0, "multiplication_factor": 30}
    augment(settings(model, source, tmp_path / "out.jsonl", embeddings=str(tmp_path / "v.txt"), candidates=2, **more))
    made = [(row["augmented_from"], row["text"].split()[1]) for row in read_lines(tmp_path / "out.jsonl")[2:]]
    assert set(made) == {(0, "Horse"), (0, "Donkey"), (1, "zq")}  # in the case of Zebra; zq is not in the table
    augment(settings(model, source, tmp_path / "own.jsonl", **more))
    own = {row["text"].split()[1] for row in read_lines(tmp_path / "own.jsonl")[2:] if row["augmented_from"] == 1}
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    table = AutoModelForMaskedLM.from_pretrained(model).get_input_embeddings().weight.detach().numpy()
    words = [name for name in tokenizer.get_vocab() if name.isalpha()]
    vectors = table[tokenizer.convert_tokens_to_ids(words)]
    mean = table[tokenizer.convert_tokens_to_ids(["z", "##q"])].mean(axis=0)
    order = np.argsort(-(vectors @ mean) / np.linalg.norm(vectors, axis=1))
    assert own == {words[at] for at in order[:5]}


# ---- formats ----


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.json", "out.csv", "out.tsv.gz", "out.parquet"])
def test_every_format_is_read_back_the_same(model: Path, source: Path, tmp_path: Path, name: str) -> None:
    augment(settings(model, source, tmp_path / "plain.jsonl"))
    augment(settings(model, source, tmp_path / name))
    again = tmp_path / f"again-{name}"
    augment(settings(model, source, again))
    assert again.read_bytes() == (tmp_path / name).read_bytes()
    kind = "parquet" if "parquet" in name else "json" if "json" in name else "csv"
    more = {"sep": "\t"} if "tsv" in name else {}
    rows = datasets.load_dataset(kind, data_files=str(tmp_path / name), split="train", **more)
    assert rows.to_list() == read_lines(tmp_path / "plain.jsonl")


def test_parquet_keeps_types_and_class_names(model: Path, tmp_path: Path) -> None:
    kinds = datasets.Features(
        text=datasets.Value("large_string"), label=datasets.ClassLabel(names=["no", "yes"]),
        when=datasets.Value("timestamp[us]"), raw=datasets.Value("binary"),
    )  # fmt: skip
    rows = [{**row, "when": None, "raw": b"\x00"} for row in ROWS]
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(str(tmp_path / "in.parquet"))
    augment(settings(model, tmp_path / "in.parquet", tmp_path / "out.parquet"))
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")
    assert {name: made.features[name] for name in kinds} == kinds
    assert pq.read_table(tmp_path / "out.parquet")["raw"].to_pylist() == [b"\x00"] * len(made)


def test_tags_stay_with_their_words(model: Path, tmp_path: Path) -> None:
    rows = [{"tokens": text.split(), "ner_tags": [f"T{at}" for at in range(len(text.split()))]} for text in TEXTS]
    augment(settings(model, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"))
    made = read_lines(tmp_path / "out.jsonl")
    assert made[0] == {**rows[0], "augmented_from": 0, "augmentation": 0}
    for row in made[len(rows) :]:
        source = rows[row["augmented_from"]]
        assert row["ner_tags"] == source["ner_tags"] and len(row["tokens"]) == len(source["tokens"])
        assert row["tokens"] != source["tokens"] and all(word and " " not in word for word in row["tokens"])


def test_pairs_are_rewritten_in_both_columns(model: Path, tmp_path: Path) -> None:
    rows = [{"a": text, "b": TEXTS[0], "other": text} for text in TEXTS]
    config = {"text_column": "a", "text_pair_column": "b", "replace_probability": 1.0}
    augment(settings(model, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", **config))
    for row in read_lines(tmp_path / "out.jsonl")[len(rows) :]:
        source = rows[row["augmented_from"]]
        assert row["a"] != source["a"] and row["b"] != source["b"] and row["other"] == source["other"]


def check_answers(made: dict[str, Any]) -> int:
    ids, count = set(), 0
    for article in made["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                assert question["id"] not in ids
                ids.add(question["id"])
                for answer in [*question["answers"], *question.get("plausible_answers", ())]:
                    start = answer["answer_start"]
                    assert paragraph["context"][start : start + len(answer["text"])] == answer["text"]
                    count += 1
    return count


def test_answers_are_kept_and_found_again(model: Path, tmp_path: Path) -> None:
    answers = [["funny", "warm and funny"], ["the jokes"], ["best"], ["rhythm"], ["clever", "charming"], ["dull"]]
    content = squad(list(TEXTS), answers, licence="free")
    impossible = {"id": "no", "question": "who?", "is_impossible": True, "answers": [],
                  "plausible_answers": [{"text": "film", "answer_start": 17}]}  # fmt: skip
    content["data"][0]["paragraphs"][0]["qas"].append(impossible)
    (tmp_path / "in.json").write_text(json.dumps(content))
    found = augment(settings(model, tmp_path / "in.json", tmp_path / "out.json.gz", replace_probability=1.0))
    made = json.loads(gzip.decompress((tmp_path / "out.json.gz").read_bytes()))
    assert {name: value for name, value in made.items() if name != "data"} == {"version": "1.1", "licence": "free"}
    assert check_answers(made) == (found["augmented_rows"] // 6 + 1) * 9
    rows = [paragraph for article in made["data"] for paragraph in article["paragraphs"]]
    assert len(rows) == found["rows"] and [row["augmentation"] for row in rows[:6]] == [0] * 6
    for row in rows[6:]:
        assert row["context"] != TEXTS[row["augmented_from"]]
        assert row["qas"][0]["id"] == f"{row['augmented_from']}-0-augmented-{row['augmentation']}"
    assert rows[6]["qas"][2]["is_impossible"] and "film" in rows[6]["context"]


def test_questions_in_columns_keep_their_answers_too(model: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(at), "question": "what?", "context": text,
         "answers": {"text": [text.split()[3]], "answer_start": [len(" ".join(text.split()[:3])) + 1]}}
        for at, text in enumerate(TEXTS)
    ]  # fmt: skip
    config = {"replace_probability": 1.0}
    augment(settings(model, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", **config))
    made = read_lines(tmp_path / "out.jsonl")
    assert len({row["id"] for row in made}) == len(made) > len(rows)
    for row in made:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text == rows[row["augmented_from"]]["answers"]["text"][0]


def test_the_shared_questions(model: Path, data_dir: Path, tmp_path: Path) -> None:
    content = json.loads((data_dir / "squad" / "validation.json").read_text())
    content["data"] = content["data"][:1]
    (tmp_path / "in.json").write_text(json.dumps(content))
    more = {"max_length": 16, "part_words": 500}
    found = augment(settings(model, tmp_path / "in.json", tmp_path / "out.json", **more))
    made = json.loads((tmp_path / "out.json").read_text())
    questions = sum(len(one["qas"]) for one in content["data"][0]["paragraphs"])
    assert found["repeated"] == 0 and check_answers(made) == 4 * questions


def test_a_dump_reads_what_was_written(model: Path, tiny_teacher_dir: Path, source: Path, tmp_path: Path) -> None:
    found = augment(settings(model, source, tmp_path / "out.jsonl.gz"))
    kept = {"keep_columns": ["augmented_from", "augmentation"]}
    dump(dump_settings(tiny_teacher_dir, tmp_path / "out.jsonl.gz", tmp_path / "store", **kept))
    with TeacherStore.open(tmp_path / "store") as store:
        (counts,) = store.sql("SELECT count(*), count(*) FILTER (augmentation = 0) FROM samples").fetchall()
    assert counts == (found["rows"], len(ROWS))


def test_memory_does_not_grow_with_the_factor(tmp_path: Path) -> None:
    """Peak of what Python holds while a part is made and read again: 4,000 views against 201."""
    passage = text_passage(" ".join(TEXTS[:4]))
    choices = [[["some", "others", "here"]] * len(passage.words)]

    def count(path: Path, made: Iterable[View]) -> None:
        path.write_text(str(sum(1 for _ in made)))

    def peak(factor: int) -> int:
        work = parts.Work.begin(tmp_path / f"{factor}.jsonl", {"parts": [[0, 1]], "settings": {}}, False)
        tracemalloc.start()
        work.keep(0, views(0, [passage], choices, factor, 0.4, 0))
        work.finish(count, 1, factor)
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        work.close()
        return high

    peak(200)
    few, many = peak(201), peak(4000)
    assert many - few < 4000 * 150  # bytes: a hash in a set for each view, not its line of 300


def test_arrow_tables_of_any_chunks(model: Path, tmp_path: Path) -> None:
    """Rows taken across record batches."""
    table = pa.Table.from_pylist(ROWS)
    with pq.ParquetWriter(tmp_path / "in.parquet", table.schema) as writer:
        for at in range(len(table)):
            writer.write_table(table.slice(at, 1))
    augment(settings(model, tmp_path / "in.parquet", tmp_path / "out.jsonl"))
    augment(settings(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "same.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()
