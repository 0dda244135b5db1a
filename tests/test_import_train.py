"""A student learns from an import what it learns from a dump of the same teacher on the same tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import language_cases
import pytest
import torch
from import_cases import imported, lines, parquet, top_k_rows, vllm_row
from language_cases import LINES, byte_level, llama, saved
from predistill.store import StoreMismatch, TeacherStore
from predistill.student_train.settings import TrainConfig
from predistill.student_train.train import train
from predistill.teacher_dump.dump import dump

own_cache = language_cases.own_cache  # a fixture
K = 8
FAST = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "num_train_epochs": 1, "use_cpu": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_level()
    return saved(tmp_path_factory.mktemp("teacher"), llama(len(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("student") / "tiny.json"
    path.write_text(json.dumps({
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    }))  # fmt: skip
    return str(path)


def learnt(store: TeacherStore, small: str, folder: Path, **more: Any) -> dict[str, Any]:
    arguments = {**FAST, **more.pop("training_arguments", {})}
    options = {"student_config": small, "alpha": 0.5, "training_arguments": arguments, **more}
    return train(TrainConfig(stores=[str(store.path)], output_dir=str(folder), **options))


def test_as_from_a_dump(teacher: Path, student: str, tmp_path: Path) -> None:
    texts = [f"{line} {number}" for number in range(4) for line in LINES]
    source = language_cases.write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    dump(language_cases.settings(teacher, source, tmp_path / "dumped", top_k_logits=K))
    dumped, model = TeacherStore.open(tmp_path / "dumped"), language_cases.LlamaForCausalLM.from_pretrained(teacher)
    rows = []
    for row in range(len(texts)):
        ids = dumped.select()[row]["input_ids"].tolist()
        with torch.no_grad():
            rows.append(vllm_row(ids, model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy(), k=K))
    options = {"tokenizer": str(teacher), "dtype": "float32", "top_k_logits": K}
    store = imported(lines(tmp_path / "vllm.jsonl", rows), tmp_path / "imported", **options)
    assert store.identity["tokenizer"]["sha256"] == dumped.identity["tokenizer"]["sha256"]
    for given in ({"temperature": 1.0}, {"temperature": 2.0}, {"temperature": 1.0, "loss": "kl:tail=renormalize"}):
        name = "".join(one for one in str(given) if one.isalnum())
        ours = learnt(store, student, tmp_path / f"a{name}", **given)
        theirs = learnt(dumped, student, tmp_path / f"b{name}", **given)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)


def test_what_cannot_be_known_is_said_when_it_is_asked_for(
    teacher: Path, student: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    docs = [
        (ids, torch.randn(len(ids), 416, generator=torch.Generator().manual_seed(1)).log_softmax(-1).double().numpy())
        for ids in (byte_level()(line)["input_ids"] for line in LINES)
    ]
    source = parquet(tmp_path / "rows.parquet", top_k_rows(docs))
    options = {"ids_column": "ids", "values_column": "logprobs", "tokenizer": str(teacher), "vocabulary": 416}
    store = imported(source, tmp_path / "logprobs", **options)
    logits = imported(source, tmp_path / "logits", values="logits", **options)
    for one, temperature, said in (
        (store, 1.0, ""), (store, 2.0, "at temperature 2 is estimated; an import cannot know it"),
        (logits, 1.0, "what its others weigh is not known, and they are taken to weigh nothing"),
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            learnt(one, student, tmp_path / f"{one.path.name}{temperature}", temperature=temperature)
        found = [record.getMessage() for record in caplog.records if "the store" in record.getMessage()]
        assert len(found) == bool(said) and all(said in each and "\n" not in each for each in found)
    with pytest.raises(StoreMismatch):
        other = byte_level()
        other.add_tokens(["another"])
        language_cases.saved(tmp_path / "student", llama(len(other)), other)
        learnt(store, student, tmp_path / "no", student=str(tmp_path / "student"), student_config=None)


def test_an_unknown_tokenizer(teacher: Path, student: str, tmp_path: Path) -> None:
    """Nothing to hold a student against: the ids are taken as they are."""
    docs = [(ids, torch.randn(len(ids), 416).log_softmax(-1).double().numpy()) for ids in ([1, 2, 3, 4], [5, 6, 7])]
    store = imported(
        parquet(tmp_path / "rows.parquet", top_k_rows(docs)), tmp_path / "store", ids_column="ids",
        values_column="logprobs", vocabulary=416,
    )  # fmt: skip
    assert store.tokenizer_dir is None
    found = learnt(store, student, tmp_path / "run", student=str(teacher), student_config=None)
    assert found["train_loss"] > 0
