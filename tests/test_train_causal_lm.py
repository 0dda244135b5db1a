"""`train` on causal-lm stores: a folder that generates, students of every kind, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from language_store import random_rows, write_store
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError, DataError, StoreMismatch
from predistill.student_train.train import train
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

FAST = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "num_train_epochs": 2, "use_cpu": True}
LINES = ["the quick brown fox", "a lazy dog sleeps", "the dog and the fox", "brown foxes are quick", "a fox, a dog"]
TINY: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def save_tokenizer(folder: Path, merges: int) -> Any:
    """Byte-level BPE with so many merges, in the order that a longer training finds them too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = sorted({letter for line in LINES for letter in line if letter != " "}) + ["Ġ"]
    trainer = trainers.BpeTrainer(
        vocab_size=1 + len(letters) + merges, special_tokens=["<|end|>"], initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 20)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def teacher_dir(tokenizer, tmp_path_factory) -> Path:
    """Two layers, tied embeddings, a vocabulary padded by five."""
    torch.manual_seed(7)
    settings = {**TINY, "num_hidden_layers": 2, "vocab_size": len(tokenizer) + 5, "initializer_range": 0.3}
    folder = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(LlamaConfig(**{**settings, "tie_word_embeddings": True})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(tokenizer, count, seed):
    return random_rows(count, seed, vocabulary=len(tokenizer), longest=12)


def make_store(folder, tokenizer, tokenizer_dir, teacher_dir, seed=0, **more):
    model = LlamaForCausalLM.from_pretrained(teacher_dir).eval()

    @torch.no_grad()
    def logits(ids):
        return model(input_ids=torch.tensor([ids])).logits[0]

    rows = {"train": rows_of(tokenizer, 40, seed), "validation": rows_of(tokenizer, 15, seed + 1)}
    identity = {"teacher": {"name": str(teacher_dir)}}
    return write_store(
        folder, rows, logits, tokenizer=tokenizer, tokenizer_dir=tokenizer_dir, identity=identity, **more
    )


@pytest.fixture(scope="module")
def store(tokenizer, tokenizer_dir, teacher_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    return make_store(folder, tokenizer, tokenizer_dir, teacher_dir, temperatures=[2])


@pytest.fixture
def store_of(tokenizer, tokenizer_dir, teacher_dir, tmp_path):
    return lambda name="store", **more: make_store(tmp_path / name, tokenizer, tokenizer_dir, teacher_dir, **more)


@pytest.fixture(scope="module")
def student_config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("students") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def settings(store, output, **more):
    arguments = {**FAST, **more.pop("training_arguments", {})}
    return {"stores": [str(store.path)], "output_dir": str(output), "training_arguments": arguments, **more}


def test_the_folder_generates_and_says_where_it_comes_from(store, student_config, tmp_path, capfd):
    out = tmp_path / "student"
    metrics = train(settings(store, out, student_config=student_config))
    captured = capfd.readouterr()
    assert captured.out == "" and "eval_perplexity" in captured.err
    wanted = {"loss", "loss_labels", "loss_logits", "perplexity", "token_accuracy", "teacher_agreement"}
    assert {f"eval_{name}" for name in wanted} <= metrics.keys()
    assert json.loads((out / "metrics.json").read_text()) == metrics
    model = AutoModelForCausalLM.from_pretrained(out)
    assert metrics["student_parameters"] == model.num_parameters() and metrics["output_dir"] == str(out)
    assert model.config.eos_token_id == model.config.pad_token_id == 0
    assert pipeline("text-generation", model=str(out))("the", max_new_tokens=3)[0]["generated_text"].startswith("the")
    made = json.loads((out / "predistill.json").read_text())
    assert [(term["name"], term["temperature"]) for term in made["terms"]] == [("labels", None), ("logits", 1.0)]
    assert made["stores"][0]["task"] == "causal-lm" and made["rows"] == 40
    card = (out / "README.md").read_text()
    assert f"| perplexity | {metrics['eval_perplexity']:.4f} |" in card and "pipeline_tag: text-generation" in card
    assert "Labels" not in card and 'pipeline("text-generation"' in card


def test_label_only_sees_no_teacher_but_is_compared_with_it(store, student_config, tmp_path):
    metrics = train(settings(store, tmp_path / "out", student_config=student_config, alpha=0.0))
    assert "eval_loss_logits" not in metrics and metrics["eval_loss"] == metrics["eval_loss_labels"]
    assert 0 <= metrics["eval_teacher_agreement"] <= 1


def test_the_teachers_own_layers(store, tmp_path):
    fixed = {"training_arguments": {"learning_rate": 0.0}}
    metrics = train(settings(store, tmp_path / "all", student="from-teacher-layers:1,2", **fixed))
    assert metrics["eval_teacher_agreement"] == 1 and metrics["eval_loss_logits"] == pytest.approx(0, abs=1e-6)
    smaller = train(settings(store, tmp_path / "one", student="from-teacher-layers:2"))
    assert smaller["student_parameters"] < metrics["student_parameters"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "one").config.num_hidden_layers == 1


def test_a_pretrained_student_with_the_same_tokenizer(store, teacher_dir, tmp_path):
    metrics = train(settings(store, tmp_path / "out", student=str(teacher_dir), loss="jsd", temperature=2.0))
    assert metrics["eval_loss_logits"] < 0.1


def test_an_interrupted_run_goes_on(store, student_config, tmp_path):
    from safetensors.torch import load_file

    more = {"student_config": student_config, "training_arguments": {"num_train_epochs": 3, "save_strategy": "epoch"}}
    train(settings(store, tmp_path / "whole", **more))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("checkpoint-15", "model.safetensors"):
        path = tmp_path / "part" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(settings(store, tmp_path / "part", resume_from_checkpoint="true", **more))
    whole, rest = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def test_several_stores_one_after_another(store, store_of, student_config, tmp_path):
    both = [str(store.path), str(store_of("second", seed=5, temperatures=[2]).path)]
    train(settings(store, tmp_path / "out", student_config=student_config) | {"stores": both})
    assert json.loads((tmp_path / "out" / "predistill.json").read_text())["rows"] == 80
    other = store_of("other", k=7, temperatures=[2])
    with pytest.raises(StoreMismatch, match=r'column teacher_top_k_indices differs: .*\["S", 5.*\["S", 7'):
        train(settings(store, tmp_path / "x", student_config=student_config, several_stores="concatenate")
              | {"stores": [both[0], str(other.path)]})  # fmt: skip


# ---- what is refused ----


def test_a_tokenizer_that_differs_by_one_merge(store, teacher_dir, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(teacher_dir, folder)
    save_tokenizer(folder, 21)
    with pytest.raises(StoreMismatch, match=r"tokenizer differs: store \w+, student \w+ .*the teacher's own tokens"):
        train(settings(store, tmp_path / "out", student=str(folder)))
    backend = json.loads((teacher_dir / "tokenizer.json").read_text())
    merges = backend["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(StoreMismatch, match=r"tokenizer differs: .*\(merges\)"):
        train(settings(store, tmp_path / "out", student=str(folder)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab_size": 30}, DataError, "the student embeds 30 tokens, the tokenizer has 4[0-9]"),
        ({"max_position_embeddings": 9}, DataError, "reads at most 9 tokens, the longest row has 12"),
        ({"model_type": "bert"}, ConfigError, "BertLMHeadModel sees tokens that come later"),
        ({"model_type": "t5"}, ConfigError, "T5Config"),
    ],
)
def test_students_that_cannot_learn_from_the_store(store, tmp_path, change, error, message):
    (tmp_path / "student.json").write_text(json.dumps({**TINY, **change}))
    with pytest.raises(error, match=message):
        train(settings(store, tmp_path / "out", student_config=str(tmp_path / "student.json")))
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("sampled", {"temperature": 2.0}, "samples at temperature 1; got --temperature 2"),
        ("sampled", {"loss": "jsd"}, "--loss kl or soft_cross_entropy can be computed, not jsd"),
        ("top-k", {"pseudo_labels": 0.5}, "--pseudo-labels is for rows without labels"),
        ("top-k", {"loss": "dkd"}, "loss dkd needs every logit of the teacher"),
    ],
)
def test_losses_that_cannot_be_had(store_of, student_config, tmp_path, kind, more, message):
    store = store_of(kind=kind)
    with pytest.raises(ConfigError, match=message):
        train(settings(store, tmp_path / "out", student_config=student_config, **more))


def test_a_student_that_mixes_packed_documents(tokenizer, store_of, student_config, tmp_path):
    places = {split: [[0] * len(ids) for ids, _ in rows_of(tokenizer, count, seed)]
              for split, count, seed in (("train", 40, 0), ("validation", 15, 1))}  # fmt: skip
    store = store_of(position_ids=places)
    train(settings(store, tmp_path / "out", student_config=student_config))
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}
    (tmp_path / "bloom.json").write_text(json.dumps(bloom))
    with pytest.raises(ConfigError, match="several documents a row, which BloomForCausalLM does not tell apart"):
        train(settings(store, tmp_path / "x", student_config=str(tmp_path / "bloom.json")))


# ---- both phases ----


@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 16}, {"positions": "completion"}], ids=str)
def test_from_text_to_student(teacher_dir, tmp_path, more):
    """What the dump writes, the student learns from: not trained, the teacher's own layers are the teacher."""
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    for split, lines in (("train", LINES), ("validation", LINES[:3])):
        asked = "positions" in more
        rows = [{"prompt": "the", "completion": f" {line}"} if asked else {"text": line} for line in lines]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ",".join(f"{split}={tmp_path / split}.jsonl" for split in ("train", "validation"))
    dump(
        DumpConfig(
            teacher=str(teacher_dir), dataset=data, task="causal-lm", output_dir=str(tmp_path / "store"),
            top_k_logits=6, dtype="float32", device="cpu", **more,
        )
    )  # fmt: skip
    store = TeacherStore.open(tmp_path / "store")
    fixed = {"teacher": str(teacher_dir), "training_arguments": {"learning_rate": 0.0}}
    metrics = train(settings(store, tmp_path / "out", student="from-teacher-layers:1,2", **fixed))
    assert metrics["eval_teacher_agreement"] == 1 and metrics["eval_loss_logits"] == pytest.approx(0, abs=1e-6)
    rows = store.select("validation")[:]
    known = rows["labels"][:, 1:] != -100
    exact = -rows["teacher_label_logprobs"][:, :-1][known].mean()
    assert metrics["eval_loss_labels"] == pytest.approx(exact, rel=1e-5)
