"""`train` from stores to a folder that loads: without the teacher, resumable, refusing what cannot work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from classification_store import MISSING, random_rows, write_store
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError, DataError, StoreMismatch
from predistill.student_train.settings import TrainConfig
from predistill.student_train.train import train
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, pipeline
from transformers.trainer_callback import CallbackHandler

FAST = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 2, "use_cpu": True}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def student_config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("students") / "tiny.json"
    settings = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 32, "max_position_embeddings": 32}  # fmt: skip
    path.write_text(json.dumps(settings))
    return str(path)


def make_store(folder: Path, tokenizer, tokenizer_dir, seed=0, split_rows=(40, 15), **more) -> TeacherStore:
    """Rows whose class is their first token, 7 or 8: a student learns it in a few steps."""
    splits, logits, labels, generator = {}, {}, {}, np.random.default_rng(seed)
    for split, count in zip(("train", "validation"), split_rows, strict=False):
        rows = random_rows(count, seed + len(splits))
        rows = [[7 + at % 2, *row] for at, row in enumerate(rows)]
        truth = np.arange(count) % 2
        splits[split], labels[split] = rows, truth.copy()
        logits[split] = np.stack([-3.0 + 6 * (truth == 0), -3.0 + 6 * (truth == 1)], 1) + generator.normal(
            0, 0.5, (count, 2)
        )
    labels["train"][5::4] = MISSING
    settings = {"label_names": ["no", "yes"], "tokenizer": tokenizer, "tokenizer_dir": tokenizer_dir, **more}
    if settings.get("texts") == "decoded":
        settings["texts"] = {split: [tokenizer.decode(row) for row in rows] for split, rows in splits.items()}
    return write_store(folder, splits, logits, labels, **settings)


@pytest.fixture(scope="module")
def store(tokenizer, tiny_tokenizer_dir, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "store", tokenizer, tiny_tokenizer_dir)


def settings(store, student_config, output, **more):
    arguments = {**FAST, **more.pop("training_arguments", {})}
    chosen = {"stores": [str(store.path)], "student_config": student_config, "output_dir": str(output), **more}
    return {name: value for name, value in {**chosen, "training_arguments": arguments}.items() if value is not None}


def test_the_folder_loads_and_says_where_it_comes_from(store, student_config, tmp_path, capfd):
    out = tmp_path / "student"
    metrics = train(settings(store, student_config, out, training_arguments={"num_train_epochs": 30}))
    captured = capfd.readouterr()
    assert captured.out == "", "stdout is for data"
    assert "eval_accuracy" in captured.err and "\r" not in captured.err
    assert metrics["eval_accuracy"] > 0.9 and metrics["train_loss"] > 0 and metrics["train_runtime"] > 0
    assert {"eval_macro_f1", "eval_loss", "eval_teacher_agreement"} <= metrics.keys()
    assert json.loads((out / "metrics.json").read_text()) == metrics
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert metrics["student_parameters"] == model.num_parameters() and metrics["output_dir"] == str(out)
    assert model.config.id2label == {0: "no", 1: "yes"}
    answer = pipeline("text-classification", model=str(out))("a warm film")[0]
    assert answer["label"] in ("no", "yes")
    made = json.loads((out / "predistill.json").read_text())
    assert made["stores"][0]["fingerprint"] == store.fingerprint
    assert [term["name"] for term in made["terms"]] == ["labels", "logits"]
    assert made["versions"]["torch"] == torch.__version__ and made["training_arguments"]["learning_rate"] == 3e-3
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and f"| accuracy | {metrics['eval_accuracy']:.4f} |" in card
    assert str(tmp_path) not in card
    assert not (out / "training_args.bin").exists(), "no pickles"


def test_label_only_and_teacher_only(store, student_config, tmp_path):
    baseline = train(settings(store, student_config, tmp_path / "labels", alpha=0.0))
    assert "eval_loss_logits" not in baseline and "eval_teacher_agreement" in baseline
    assert json.loads((tmp_path / "labels" / "predistill.json").read_text())["rows"] == 31, "rows with a label"
    taught = train(settings(store, student_config, tmp_path / "teacher", alpha=1.0, where="label IS NULL"))
    assert json.loads((tmp_path / "teacher" / "predistill.json").read_text())["rows"] == 9
    assert "eval_loss_labels" not in taught
    with pytest.raises(ConfigError, match="no rows of split train that the loss can learn from"):
        train(settings(store, student_config, tmp_path / "none", alpha=0.0, where="label IS NULL"))


def test_presets_pseudo_labels_and_losses(store, student_config, tmp_path):
    runs = [
        {"preset": "tutorial"},
        {"preset": "nlp-architect", "pseudo_labels": 0.5},
        {"loss": "jsd:beta=0.3", "alpha": 1.0},
        {"loss": "dkd", "where": "teacher_confidence < 0.9999"},
    ]
    for number, more in enumerate(runs):
        metrics = train(settings(store, student_config, tmp_path / str(number), **more))
        assert np.isfinite(metrics["train_loss"])
    terms = json.loads((tmp_path / "1" / "predistill.json").read_text())["terms"]
    assert [(term["name"], term["weight"]) for term in terms] == [
        ("labels", 1.0),
        ("logits", 0.1),
        ("pseudo_labels", 0.5),
    ]


def test_evaluation_defaults(store, student_config, tmp_path, tokenizer, tiny_tokenizer_dir):
    silent = train(settings(store, student_config, tmp_path / "no", training_arguments={"eval_strategy": "no"}))
    assert not [name for name in silent if name.startswith("eval")]
    steps = {"eval_strategy": "steps", "eval_steps": 4}
    assert "eval_accuracy" in train(settings(store, student_config, tmp_path / "steps", training_arguments=steps))
    lone = make_store(tmp_path / "lone", tokenizer, tiny_tokenizer_dir, split_rows=(20,))
    assert not [
        name for name in train(settings(lone, student_config, tmp_path / "lone-out")) if name.startswith("eval")
    ]
    with pytest.raises(ConfigError, match="no split validation or test to evaluate on; the store has train"):
        train(settings(lone, student_config, tmp_path / "x", training_arguments={"eval_strategy": "epoch"}))
    with pytest.raises(ConfigError, match="split 'dev'|no split dev"):
        train(settings(store, student_config, tmp_path / "x", eval_split="dev"))


WITHOUT_TEACHER = """
import json, sys
sys.modules["predistill.teacher_dump"] = None  # importing it raises
from predistill.student_train.train import train
metrics = train(json.loads(sys.argv[1]))
assert not [name for name in sys.modules if name.startswith("predistill.teacher_dump.")]
print(json.dumps(metrics))
"""


def test_the_teacher_is_not_there_at_all(tokenizer, tiny_tokenizer_dir, tiny_teacher_dir, student_config, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_dir, teacher)
    store = make_store(tmp_path / "store", tokenizer, tiny_tokenizer_dir, identity={"teacher": {"name": str(teacher)}})
    shutil.rmtree(teacher)
    asked = json.dumps(settings(store, student_config, tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TEACHER, asked], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["eval_accuracy"] >= 0


# ---- a folder that holds something ----


def test_another_run_is_not_overwritten_unless_asked(store, student_config, tmp_path):
    out = tmp_path / "out"
    train(settings(store, student_config, out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds another run.*--overwrite-output-dir to start anew"):
        train(settings(store, student_config, out))
    train(settings(store, student_config, out, overwrite_output_dir=True, training_arguments={"num_train_epochs": 1}))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-5"]
    assert (out / "notes.txt").exists()


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= 7:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_weights(store, student_config, tmp_path, monkeypatch):
    more = {"training_arguments": {"num_train_epochs": 3, "save_steps": 3, "save_total_limit": 1}}
    train(settings(store, student_config, tmp_path / "whole", **more))
    real = CallbackHandler.__init__
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CallbackHandler, "__init__", lambda self, *a: (real(self, *a), self.add_callback(StopAfter()))[0])
        train(settings(store, student_config, tmp_path / "part", **more))
    with pytest.raises(ConfigError, match="holds another run"):
        train(settings(store, student_config, tmp_path / "part", **more))
    train(settings(store, student_config, tmp_path / "part", resume_from_checkpoint="true", **more))
    whole, rest = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def test_a_run_is_not_continued_as_another(store, student_config, tmp_path, tokenizer, tiny_tokenizer_dir):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        train(settings(store, student_config, out, resume_from_checkpoint="true"))
    train(settings(store, student_config, out))
    other = make_store(tmp_path / "other", tokenizer, tiny_tokenizer_dir, seed=5)
    again = {"resume_from_checkpoint": "true"}
    for message, asked in (
        ("store differs", settings(other, student_config, out, **again)),
        ("loss terms differs", settings(store, student_config, out, alpha=0.2, **again)),
        ("seed differs", settings(store, student_config, out, training_arguments={"seed": 1}, **again)),
        ("trainer_state.json", settings(store, student_config, out, resume_from_checkpoint=str(tmp_path))),
    ):
        with pytest.raises((ConfigError, StoreMismatch), match=message):
            train(asked)


# ---- tokens that differ ----


@pytest.fixture(scope="module")
def foreign_student(tiny_tokenizer_dir, tiny_teacher_dir, tmp_path_factory) -> Path:
    """A student whose tokenizer has the same words under other ids."""
    folder = tmp_path_factory.mktemp("foreign")
    for path in (
        *tiny_teacher_dir.glob("config.json"),
        *tiny_teacher_dir.glob("*.safetensors"),
        *tiny_tokenizer_dir.iterdir(),
    ):
        shutil.copy(path, folder)
    backend = json.loads((folder / "tokenizer.json").read_text())
    words = list(backend["model"]["vocab"])
    backend["model"]["vocab"] = {word: at for at, word in enumerate(words[:5] + words[:4:-1])}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    return folder


def test_text_is_tokenised_anew_for_a_student_with_another_tokenizer(
    foreign_student, tokenizer, tiny_tokenizer_dir, tmp_path
):
    kept = make_store(
        tmp_path / "kept", tokenizer, tiny_tokenizer_dir, texts="decoded", settings={"text_column": "text"}
    )
    out = tmp_path / "out"
    train(
        {
            "stores": [str(kept.path)],
            "student": str(foreign_student),
            "output_dir": str(out),
            "training_arguments": FAST,
        }
    )
    assert json.loads((out / "predistill.json").read_text())["student"]["retokenized"] is True
    saved = AutoTokenizer.from_pretrained(out)
    assert saved.get_vocab() == AutoTokenizer.from_pretrained(foreign_student).get_vocab() != tokenizer.get_vocab()


def test_without_its_text_it_is_refused(foreign_student, store, tmp_path):
    asked = {"stores": [str(store.path)], "student": str(foreign_student), "output_dir": str(tmp_path / "out")}
    with pytest.raises(StoreMismatch, match=r"tokenizer differs: store \w+, student \w+.*--keep-columns text"):
        train(asked)


def test_batches_of_new_tokens(foreign_student, tokenizer, tiny_tokenizer_dir, tmp_path):
    from predistill.student_train.tokens import retokenized

    kept = make_store(tmp_path / "kept", tokenizer, tiny_tokenizer_dir, texts="decoded")
    own = AutoTokenizer.from_pretrained(foreign_student)
    rows = retokenized(kept.select("train", fields=["teacher_logits"]), own, ["text"], 10)
    texts, plain = kept.select("train").column("text"), kept.select("train")
    chosen = [[3, 1], [4, 0, 20], [39]]
    for batch, numbers in zip(rows.narrowed(["teacher_logits"]).batches(chosen, buffers=2), chosen, strict=True):
        expected = own(
            [texts[number] for number in numbers], padding=True, truncation=True, max_length=10, return_tensors="np"
        )
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            np.testing.assert_array_equal(batch[name], expected[name])
        np.testing.assert_array_equal(batch["teacher_logits"], plain[numbers]["teacher_logits"])
    np.testing.assert_array_equal(rows[5]["input_ids"], own(texts[5], truncation=True, max_length=10)["input_ids"])


# ---- several stores, and refusals ----


def test_several_stores_one_after_another(store, student_config, tmp_path, tokenizer, tiny_tokenizer_dir):
    other = make_store(tmp_path / "other", tokenizer, tiny_tokenizer_dir, seed=5)
    train(settings(store, student_config, tmp_path / "out", stores=[str(store.path), str(other.path)]))
    made = json.loads((tmp_path / "out" / "predistill.json").read_text())
    assert made["rows"] == 80 and len(made["stores"]) == 2
    wrong = make_store(tmp_path / "wrong", tokenizer, tiny_tokenizer_dir, label_names=["yes", "no"])
    with pytest.raises(StoreMismatch, match='label names differs: .* has \\["no", "yes"\\], .* has \\["yes", "no"\\]'):
        both = [str(store.path), str(wrong.path)]
        train(settings(store, student_config, tmp_path / "x", stores=both, several_stores="concatenate"))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"where": "no_such_column > 1"}, ConfigError, "no_such_column"),
        ({"where": "1 = 0"}, ConfigError, "--where '1 = 0' keeps no rows"),
        ({"train_split": "dev"}, ConfigError, "split 'dev' is not there; it has train, validation"),
        ({"training_arguments": {"learning_rte": 1}}, ConfigError, "learning_rte is not a field of transformers"),
        ({"training_arguments": {"lr_scheduler_type": "cubic"}}, ConfigError, "cubic"),
        ({"loss": "klx"}, ConfigError, "klx"),
        ({"loss": "kl:standardize"}, ConfigError, "3 classes or more"),
        ({"stores": ["nowhere"]}, Exception, "nowhere is not a store"),
    ],
)
def test_clear_refusals(store, student_config, tmp_path, more, error, message):
    with pytest.raises(error, match=message):
        train(settings(store, student_config, tmp_path / "out", **more))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_student_that_is_too_short(store, tmp_path):
    small = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 9}  # fmt: skip
    (tmp_path / "short.json").write_text(json.dumps(small))
    with pytest.raises(DataError, match="reads at most 9 tokens, the longest row has 1[0-9]"):
        train(settings(store, str(tmp_path / "short.json"), tmp_path / "out"))
    train(settings(store, str(tmp_path / "short.json"), tmp_path / "out2", where="num_tokens <= 9",
                   training_arguments={"eval_strategy": "no"}))  # fmt: skip


def test_settings_need_a_store_a_student_and_a_folder():
    for wrong, message in (
        ({"stores": [], "student": "a", "output_dir": "b"}, "a store is missing"),
        ({"stores": ["s"], "student": "a"}, "--output-dir is missing"),
        ({"stores": ["s"], "output_dir": "b"}, "got neither"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**wrong)


def test_from_text_to_student(tiny_teacher_dir, tmp_path):
    """Both phases: what the dump writes, the student learns from; its own layers make the student."""
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    lines = [json.dumps({"text": f"a {word} film", "label": at % 2}) for at, word in enumerate(["dull", "clever"] * 12)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:-1] + [json.dumps({"text": "funny", "label": None})]))
    (tmp_path / "validation.jsonl").write_text("\n".join(lines[:6]))
    data = f"train={tmp_path / 'train.jsonl'},validation={tmp_path / 'validation.jsonl'}"
    dump(
        DumpConfig(
            teacher=str(tiny_teacher_dir), dataset=data, task="text-classification",
            output_dir=str(tmp_path / "store"), dtype="float32", device="cpu",
        )
    )  # fmt: skip
    metrics = train(
        {
            "stores": [str(tmp_path / "store")],
            "student": "from-teacher-layers:1,2",
            "teacher": str(tiny_teacher_dir),
            "output_dir": str(tmp_path / "student"),
            "training_arguments": {**FAST, "learning_rate": 0.0, "eval_strategy": "epoch"},
        }
    )
    assert metrics["eval_teacher_agreement"] == 1.0, "all layers, not trained: the teacher itself"
    assert metrics["eval_loss_logits"] == pytest.approx(0, abs=1e-6)
    assert json.loads((tmp_path / "student" / "config.json").read_text())["id2label"] == {
        "0": "negative",
        "1": "positive",
    }
