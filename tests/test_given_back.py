"""A run that was refused or stopped before anything of its student was there leaves nothing; what is nobody's store is
not written over; what was made for another task is not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dump_cases
import numpy as np
import pytest
from classification_store import random_rows, write_store
from predistill.store import ConfigError, StoreMismatch
from predistill.store.remote.config import PushConfig
from predistill.store.remote.push import push
from predistill.student_train.train import train
from transformers import BertConfig

own_cache = dump_cases.own_cache  # a fixture
FAST = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture
def store(tmp_path: Path, tiny_tokenizer_dir: Path) -> Path:
    rows = random_rows(12, 1, 60)
    logits = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    write_store(tmp_path / "store", *({"train": of, "validation": of} for of in (rows, logits, np.arange(12) % 3)),
                tokenizer_dir=tiny_tokenizer_dir)  # fmt: skip
    return tmp_path / "store"


@pytest.fixture
def student(tmp_path: Path) -> str:
    BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64
    ).to_json_file(tmp_path / "student.json")
    return str(tmp_path / "student.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"per_device_train_batch_size": 0}, "--per-device-train-batch-size is 1 or more; got 0"),
        ({"learning_rate": -1.0}, "--learning-rate is 0 or more; got -1"),
        ({"num_train_epochs": 0, "max_steps": -1}, "--num-train-epochs is more than 0; got 0"),
    ],
)
def test_the_corrected_command_runs(store: Path, student: str, tmp_path: Path, more: Any, message: str) -> None:
    settings = {"stores": [str(store)], "student_config": student, "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=message):
        train({**settings, "training_arguments": {**FAST, **more}})
    assert train({**settings, "training_arguments": FAST})["student_parameters"] > 0


def test_a_run_that_failed_before_its_first_checkpoint_is_no_run(
    store: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from predistill.student_train import train as story

    settings = {"stores": [str(store)], "student_config": student, "output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as broken:
        broken.setattr(story.DistillationTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train({**settings, "training_arguments": FAST})
    assert not (tmp_path / "run/predistill.json").exists()
    train({**settings, "training_arguments": FAST})
    with pytest.raises(ConfigError, match="holds another run"):
        train({**settings, "training_arguments": FAST})


def test_the_best_checkpoint_is_one_that_was_evaluated(store: Path, student: str, tmp_path: Path) -> None:
    settings = {"stores": [str(store)], "student_config": student, "output_dir": str(tmp_path / "run")}
    arguments = {name: value for name, value in FAST.items() if name not in ("save_strategy", "max_steps")}
    train({**settings, "training_arguments": {**arguments, "num_train_epochs": 2, "load_best_model_at_end": True}})
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2


def test_a_store_is_given_once(store: Path, student: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is given twice"):
        train({"stores": [str(store), f"{store}/"], "student_config": student, "output_dir": str(tmp_path / "run")})


@pytest.mark.parametrize("name", ["README.md", "plan.json"])
def test_a_folder_that_is_no_store_is_not_pushed_over(store: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "project"
    place.mkdir()
    (place / name).write_text("mine")
    with pytest.raises(StoreMismatch, match=f"holds {name} and is not a store"):
        push(PushConfig(str(store), f"file://{place}"))
    assert (place / name).read_text() == "mine" and len(list(place.iterdir())) == 1
    push(PushConfig(str(store), f"file://{place}", overwrite=True))
    assert json.loads((place / "plan.json").read_text())


def test_a_teacher_of_another_task_is_refused(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Its head would load: it has the shape and the name of the other's."""
    from predistill.teacher_dump.dump import dump

    teacher = dump_cases.bert(tiny_tokenizer_dir, tmp_path / "teacher")
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"tokens": ["a", "warm", "film"], "ner_tags": [0, 1, 0]}) + "\n")
    config = dump_cases.settings(teacher, source, tmp_path / "store", task="token-classification", text_column="tokens",
                                 label_column="ner_tags")  # fmt: skip
    with pytest.raises(ConfigError, match="is a BertForSequenceClassification; --task token-classification needs"):
        dump(config)
