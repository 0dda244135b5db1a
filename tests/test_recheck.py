"""Stored rows through the live teacher again: what is stored is found to be its own, and what is not is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dump_cases
import image_cases
import language_cases
import numpy as np
import pyarrow as pa
import pytest
import question_cases
import token_cases
import torch
from dump_cases import bert
from import_cases import lines, vllm_row
from language_cases import byte_level, llama, saved
from predistill.store import ConfigError, FieldSpec, StoreMismatch, TeacherStore
from predistill.store.codecs import codec_of
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump
from predistill.teacher_dump.import_outputs import import_outputs
from predistill.teacher_dump.importing.config import ImportConfig
from predistill.teacher_dump.recheck import recheck, rechecked
from predistill.teacher_dump.rechecking.compare import compare
from predistill.teacher_dump.rechecking.config import RecheckConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

own_cache = dump_cases.own_cache  # a fixture
LANGUAGE: dict[str, dict[str, Any]] = {
    "top k": {"top_k_logits": 8, "dtype": "float16", "temperatures": [2.0]},
    "top p, 8 bits": {"top_k_logits": 16, "top_p": 0.8, "dtype": "int8"},
    "all logits, bfloat16": {"top_k_logits": 0, "dtype": "bfloat16"},
    "draws": {"sampled_logits": 12, "sample_temperature": 1.5},
    "packed": {"packing": True, "max_length": 64, "top_k_logits": 8},
    "inside": {"fields": ["logits", "hidden_states", "attentions", "queries"], "top_k_logits": 8, "dtype": "int8"},
}


def again(folder: Path, teacher: Path, **more: Any) -> dict[str, Any]:
    return recheck(folder, RecheckConfig(teacher=str(teacher), device="cpu", **{"sample": 20, **more}))


def disturbed(teacher: Path, folder: Path, kind: Any, size: float = 0.02) -> Path:
    """The same architecture and tokenizer with other weights."""
    from transformers import AutoTokenizer

    model = kind.from_pretrained(teacher)
    torch.manual_seed(4)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(size * torch.randn_like(one))
    return saved(folder, model, AutoTokenizer.from_pretrained(teacher))


@pytest.fixture(scope="module")
def language_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_level()
    return saved(tmp_path_factory.mktemp("language"), llama(len(tokenizer)), tokenizer)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name: str, language_teacher: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{line} {number}"} for number in range(6) for line in language_cases.LINES]
    config = language_cases.settings(
        language_teacher, language_cases.write(tmp_path / "rows.jsonl", rows), tmp_path / "store", **LANGUAGE[name]
    )
    dump(config)
    found = again(tmp_path / "store", language_teacher)
    assert not found["problems"] and not found["differences"]
    kept = {
        spec.name for spec in TeacherStore.open(tmp_path / "store").fields.values()
        if spec.role == "teacher" and not spec.name.endswith(("indices", "_sizes", "top_k_counts"))
    }  # fmt: skip
    assert set(found["fields"]) == kept
    assert all(0 <= one["worst"] <= 1 and one["values"] > 20 for one in found["fields"].values())
    other = disturbed(language_teacher, tmp_path / "other", AutoModelForCausalLM)
    found = again(tmp_path / "store", other)
    assert {one["name"] for one in found["differences"]} == {"teacher.weights_sha256"}
    assert {one["detail"].split()[0] for one in found["problems"]} == set(found["fields"])
    assert all(one["path"] == "shards/train-00000.arrow" and "other" in one["detail"] for one in found["problems"])


def test_completions_are_rechecked_where_they_are_stored(language_teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "what is the sky ", "completion": f"it is blue {number}"} for number in range(9)]
    source = language_cases.write(tmp_path / "rows.jsonl", rows)
    config = language_cases.settings(
        language_teacher, source, tmp_path / "store", positions="completion", top_k_logits=6, dtype="float16"
    )
    dump(config)
    found = again(tmp_path / "store", language_teacher)
    assert not found["problems"]
    stored = int(TeacherStore.open(tmp_path / "store").select()[list(range(9))]["teacher_mask"].sum())
    assert found["fields"]["teacher_top_k_logits"]["values"] == 6 * stored


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_deviations_are_those_of_the_formula(dtype: str, language_teacher: Path, tmp_path: Path) -> None:
    """Against the teacher run by hand, a row at a time, and the stored values read with pyarrow."""
    rows = [{"text": f"{line} {number}"} for number in range(2) for line in language_cases.LINES]
    source = language_cases.write(tmp_path / "rows.jsonl", rows)
    config = language_cases.settings(language_teacher, source, tmp_path / "store", top_k_logits=5, dtype=dtype)
    dump(config)
    found = again(tmp_path / "store", language_teacher, sample=1000)
    assert found["rows"] == len(rows)
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "store" / "shards" / "train-00000.arrow"))).read_all()
    model = AutoModelForCausalLM.from_pretrained(language_teacher).eval()
    store = TeacherStore.open(tmp_path / "store")
    largest, total, count = 0.0, 0.0, 0
    for row in range(len(rows)):
        ids = torch.tensor([table["input_ids"][row].as_py()])
        with torch.no_grad():
            logits = model(ids).logits[0].double()
        relative = logits - logits.amax(-1, keepdim=True)
        kept = torch.from_numpy(store.select()[row]["teacher_top_k_indices"].astype(np.int64))
        told = np.array([float(one) for each in table["teacher_top_k_logits"][row].as_py() for one in each])
        away = np.abs(told - relative.gather(1, kept).numpy().reshape(-1))
        largest, total, count = max(largest, away.max()), total + away.sum(), count + away.size
    said = found["fields"]["teacher_top_k_logits"]
    assert said["values"] == count
    assert said["largest"] == pytest.approx(largest, abs=5e-5)
    assert said["mean"] == pytest.approx(total / count, abs=2e-5)


def test_classifiers(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    source = dump_cases.write(tmp_path / "rows.jsonl", dump_cases.rows(30))
    for name, more, special in (
        ("single", {}, {}), ("inside", {"fields": ["logits", "pooled", "attentions"], "dtype": "float16"}, {}),
        ("real", {"label_column": "none", "dtype": "bfloat16"}, {"num_labels": 1}),
        ("multi", {"label_column": "none"}, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    ):  # fmt: skip
        teacher = bert(tiny_tokenizer_dir, tmp_path / f"{name}-teacher", **special)
        dump(dump_cases.settings(teacher, source, tmp_path / name, **more))
        found = again(tmp_path / name, teacher)
        assert not found["problems"] and not found["differences"] and "teacher_logits" in found["fields"]
        other = disturbed(teacher, tmp_path / f"{name}-other", AutoModelForSequenceClassification)
        assert again(tmp_path / name, other)["problems"]
    three = bert(tiny_tokenizer_dir, tmp_path / "three", num_labels=3)
    with pytest.raises(StoreMismatch, match="logits of 2 classes, and the teacher gives 3"):
        again(tmp_path / "single", three)


def test_taggers_and_readers(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    tagger = token_cases.tagger(tiny_tokenizer_dir, tmp_path / "tagger")
    rows = dump_cases.write(tmp_path / "words.jsonl", token_cases.sentences(20))
    dump(token_cases.settings(tagger, rows, tmp_path / "tags", dtype="float16"))
    reader = question_cases.reader(tiny_tokenizer_dir, tmp_path / "reader")
    asked = question_cases.write(tmp_path / "asked.jsonl", question_cases.squad(12))
    dump(question_cases.settings(reader, asked, tmp_path / "answers", dtype="float16"))
    for folder, teacher, columns in (
        ("tags", tagger, {"teacher_logits"}), ("answers", reader, {"teacher_start_logits", "teacher_end_logits"}),
    ):  # fmt: skip
        found = again(tmp_path / folder, teacher)
        assert set(found["fields"]) == columns and not found["problems"] and not found["differences"]
    with pytest.raises(ConfigError, match="is a BertForQuestionAnswering; --task token-classification needs"):
        again(tmp_path / "tags", reader)
    shutil.copytree(tagger, tmp_path / "fewer")
    AutoModelForTokenClassification.from_config(AutoConfig.from_pretrained(tagger, num_labels=2)).save_pretrained(
        tmp_path / "fewer"
    )
    with pytest.raises(StoreMismatch, match="logits of 5 classes, and the teacher gives 2"):
        again(tmp_path / "tags", tmp_path / "fewer")


def test_one_wrong_value_is_found(tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump that stores one logit of one row wrong: its shard and its row are named."""
    from predistill.teacher_dump.tasks.text_classification import TextClassification

    own: Callable[..., Any] = TextClassification.outputs

    def outputs(self: Any, samples: Any, rows: np.ndarray, captured: Any) -> dict[str, Any]:
        made = own(self, samples, rows, captured)
        made["teacher_logits"][samples.source_index[rows] == 7, 1] += 0.01
        return made

    teacher = bert(tiny_tokenizer_dir, tmp_path / "teacher")
    source = dump_cases.write(tmp_path / "rows.jsonl", dump_cases.rows(30))
    with monkeypatch.context() as patch:
        patch.setattr(TextClassification, "outputs", outputs)
        dump(dump_cases.settings(teacher, source, tmp_path / "store"))
    found = rechecked(tmp_path / "store", RecheckConfig(teacher=str(teacher), device="cpu"), verify(tmp_path / "store"))
    assert not found["ok"] and len(found["problems"]) == 1 and found["recheck"]["rows"] == 30
    said = found["recheck"]["fields"]["teacher_logits"]
    assert said["beyond"] == 1 and said["largest"] == pytest.approx(0.01, rel=1e-3)
    [problem] = found["problems"]
    assert problem["kind"] == "teacher" and "see row 7 of split train" in problem["detail"]


def test_the_same_seed_draws_the_same_rows(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = bert(tiny_tokenizer_dir, tmp_path / "teacher")
    source = dump_cases.write(tmp_path / "rows.jsonl", dump_cases.rows(40))
    dump(dump_cases.settings(teacher, source, tmp_path / "store", dtype="float16"))
    one, same, other = (again(tmp_path / "store", teacher, sample=5, seed=seed) for seed in (3, 3, 4))
    assert one == same and one["rows"] == 5
    assert one["fields"] != other["fields"]


def test_a_teacher_that_is_given(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = bert(tiny_tokenizer_dir, tmp_path / "teacher")
    source = dump_cases.write(tmp_path / "rows.jsonl", dump_cases.rows(12))
    dump(dump_cases.settings(teacher, source, tmp_path / "store"))
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    found = recheck(tmp_path / "store", RecheckConfig(teacher=str(teacher)), model)
    assert not found["problems"] and found["rows"] == 12


def test_what_was_imported_of_this_teacher(language_teacher: Path, tmp_path: Path) -> None:
    """Log-probabilities as vLLM gives them; the origin is unknown, and what is stored is the teacher's."""
    tokenizer, model = byte_level(), AutoModelForCausalLM.from_pretrained(language_teacher).eval()
    rows = []
    for line in language_cases.LINES:
        ids = tokenizer(line)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
        rows.append(vllm_row(ids, logprobs, k=8))
    source = lines(tmp_path / "rows.jsonl", rows)
    import_outputs(ImportConfig(source=str(source), output_dir=str(tmp_path / "store")))
    found = again(tmp_path / "store", language_teacher)
    assert not found["problems"] and not found["differences"]
    assert set(found["fields"]) == {"teacher_top_k_logits", "teacher_logsumexp"}
    other = disturbed(language_teacher, tmp_path / "other", AutoModelForCausalLM)
    assert len(again(tmp_path / "store", other)["problems"]) == 2


def test_teachers_that_cannot_be_run_on_it(tiny_tokenizer_dir: Path, language_teacher: Path, tmp_path: Path) -> None:
    source = language_cases.write(tmp_path / "rows.jsonl", [{"text": line * 3} for line in language_cases.LINES])
    dump(language_cases.settings(language_teacher, source, tmp_path / "store", top_k_logits=4))
    small = saved(tmp_path / "small", llama(40), byte_level())
    short = saved(tmp_path / "short", llama(len(byte_level()), max_position_embeddings=20), byte_level())
    classifier = bert(tiny_tokenizer_dir, tmp_path / "classifier")
    for teacher, kind, message in (
        (small, StoreMismatch, "has token .*, and the teacher knows 40"),
        (short, StoreMismatch, "has rows of .* tokens: the teacher takes at most 20"),
        (classifier, ConfigError, "its weights lack"),
        (tmp_path / "nowhere", ConfigError, "a folder with a saved model expected"),
    ):
        with pytest.raises(kind, match=message) as caught:
            again(tmp_path / "store", teacher)
        assert "\n" not in str(caught.value)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sample": 0}, "--sample is a whole number from 1"), ({"seed": -1}, "--seed is a whole"),
        ({"teacher": None, "sample": 3}, "--sample is about a teacher to run; give --teacher too"),
    ]  # fmt: skip
    for given, message in wrong:
        with pytest.raises(ConfigError, match=message):
            RecheckConfig(**{"teacher": str(small), **given})


@pytest.mark.parametrize("codec", ["int8", "uint8"])
def test_a_value_between_two_levels_is_within_its_bound(codec: str) -> None:
    """Half a level away, and float32's rounding of the level more: of a teacher that says exactly the same."""
    levels = 127 if codec == "int8" else 255
    now = -np.stack([np.array([top * (level + 0.5) / levels, top]) for level in range(levels) for top in (1e4, 3e-7)])
    now = now.astype(np.float32)
    spec = FieldSpec("teacher_hidden_states_01", (2,), "float32", codec=codec)
    stored = codec_of(spec).decode(codec_of(spec).encode(now, spec), spec)
    away, bounds = compare(spec, stored, now, noise=0)
    assert 0.999 < (away / bounds).max() <= 1


def test_the_command(tiny_tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from click.testing import CliRunner
    from predistill.cli import cli

    teacher = bert(tiny_tokenizer_dir, tmp_path / "teacher")
    source = dump_cases.write(tmp_path / "rows.jsonl", dump_cases.rows(12))
    dump(dump_cases.settings(teacher, source, tmp_path / "store"))
    other = disturbed(teacher, tmp_path / "other", AutoModelForSequenceClassification)
    words = ["verify", str(tmp_path / "store"), "--sample", "8", "--teacher"]
    good = CliRunner().invoke(cli, [*words, str(teacher), "--json"])
    said = json.loads(good.stdout)
    assert good.exit_code == 0 and said["ok"] and said["recheck"]["rows"] == 8
    bad = CliRunner().invoke(cli, [*words, str(other)])
    assert bad.exit_code == 1 and "teacher_logits is not what other says" in bad.stdout
    assert "teacher.weights_sha256 differs" in bad.stdout
    wide = bert(tiny_tokenizer_dir, tmp_path / "wide", num_labels=7)
    refused = CliRunner().invoke(cli, [*words, str(wide), "--json"])
    assert refused.exit_code == 1 and "Error" in refused.stderr and json.loads(refused.stdout)["ok"] is False
    (tmp_path / "store" / "shards" / "train-00000.json").unlink()
    torn = CliRunner().invoke(cli, [*words, str(teacher), "--json"])
    assert torn.exit_code == 1 and "recheck" not in json.loads(torn.stdout)
    assert "the teacher was not run" in torn.stderr


def test_images(tmp_path: Path) -> None:
    """Every view's pixels are made again of its file, and its partner's; their hashes are compared too."""
    teacher = image_cases.vit(tmp_path / "teacher")
    other = tmp_path / "other"
    source = image_cases.write(tmp_path / "train.parquet", 12)
    for name, more in (
        ("plain", {"dtype": "float16"}),
        ("views", {"views": 3, "view_transforms": ["crop", "flip", "mixup", "cutmix"]}),
        ("inside", {"fields": ["logits", "hidden_states"], "dtype": "int8"}),
    ):
        dump(image_cases.settings(teacher, source, tmp_path / name, **more))
        found = again(tmp_path / name, teacher)
        assert not found["problems"] and not found["differences"]
        assert {"teacher_logits", "pixel_hash"} <= set(found["fields"])
        assert found["fields"]["pixel_hash"]["largest"] == 0
    model = AutoModelForImageClassification.from_pretrained(teacher)
    with torch.no_grad():
        model.classifier.bias.add_(0.5)
    image_cases.processor(other)
    model.save_pretrained(other)
    [problem] = again(tmp_path / "views", other)["problems"]
    assert problem["detail"].startswith("teacher_logits is not what other says")
