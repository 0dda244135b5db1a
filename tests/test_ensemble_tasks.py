"""Ensembles of taggers, readers, language models and of teachers of images: each against what is written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import question_cases
import token_cases
import torch
from dump_cases import own_cache, write  # noqa: F401  a fixture
from language_store import write_store as write_language
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError, StoreMismatch
from predistill.student_train.config import DistillationConfig
from predistill.student_train.ensembles.join import Ensemble, joined
from predistill.student_train.losses.terms import Term
from predistill.student_train.settings import TrainConfig
from predistill.student_train.stores import select
from predistill.student_train.students import build_student
from predistill.student_train.train import train
from predistill.student_train.trainer import DistillationTrainer
from predistill.teacher_dump.dump import dump
from test_token_training import SMALL, TRAIN, VALIDATION
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FAST = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_steps": 2, "use_cpu": True}


def run(stores: list[str], output: Path, **more: Any) -> dict[str, Any]:
    arguments = {**FAST, **more.pop("training_arguments", {})}
    return train({"stores": stores, "output_dir": str(output), "training_arguments": arguments, **more})


def ensemble_rows(stores: list[str], split: str, **more: Any) -> tuple[Ensemble, Any]:
    """What `train` would read of a split."""
    config = TrainConfig(stores=stores, output_dir="unused", **more)
    made = joined(config, [TeacherStore.open(path) for path in stores], [split])
    assert made is not None
    objective = made.task.objective([Term("logits")])
    return made, select(config, made.stores, build_student(config, made.lead), objective, split, ensemble=made)


def log_mean(*logits: torch.Tensor) -> torch.Tensor:
    return torch.stack([one.softmax(-1) for one in logits]).mean(0).log()


def assert_same_distribution(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), rtol=1e-5, atol=1e-5)


# ---- taggers ----


@pytest.fixture(scope="module")
def taggers(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """{name: (teacher, store)}: two of one tokenizer, one of another; the second cuts rows at 8 tokens."""
    folder = tmp_path_factory.mktemp("taggers")
    data = f"train={write(folder / 'a.jsonl', TRAIN)},validation={write(folder / 'b.jsonl', VALIDATION)}"
    plain = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    words = [" ".join(row["tokens"]) for row in TRAIN]
    plain.train_new_from_iterator(words, 70).save_pretrained(folder / "letters")
    made = {}
    for seed, name in enumerate(("one", "two", "letters", "cut")):
        tokenizer_dir = folder / "letters" if name == "letters" else tiny_tokenizer_dir
        teacher = token_cases.tagger(tokenizer_dir, folder / f"teacher {name}", seed=seed)
        more: dict[str, Any] = {"max_length": 8} if name == "cut" else {}
        dump(token_cases.settings(teacher, data, folder / f"store {name}", shard_size=5000 + 3000 * seed, **more))
        made[name] = (teacher, str(folder / f"store {name}"))
    return made


@pytest.mark.parametrize("names", [("one", "two"), ("one", "letters"), ("letters", "one", "two")])
def test_taggers_word_by_word(taggers: Any, names: tuple[str, ...]) -> None:
    """At each word's first token of the student, the mean of what the teachers say of the word."""
    stores = [taggers[name][1] for name in names]
    _, rows = ensemble_rows(stores, "train", student=str(taggers["one"][0]))
    batch = rows[list(range(len(TRAIN)))]
    for at, row in enumerate(TRAIN):
        live = []
        for name in names:
            logits, words = token_cases.online(taggers[name][0], row["tokens"])
            live.append(logits[list(token_cases.firsts(words).values())])
        ids = batch["word_ids"][at]
        begins = [
            place for place in range(len(ids)) if ids[place] >= 0 and (place == 0 or ids[place - 1] != ids[place])
        ]
        assert len(begins) == len(row["tokens"])
        assert_same_distribution(torch.from_numpy(batch["teacher_logits"][at][begins]), log_mean(*live))


def test_taggers_are_trained_and_judged(taggers: Any, tmp_path: Path) -> None:
    stores = [taggers[name][1] for name in ("one", "two", "letters")]
    metrics = run(stores, tmp_path / "out", student=str(taggers["two"][0]), ensemble_weights="learned")
    assert {"eval_ensemble_f1", "eval_ensemble_accuracy", "eval_member_f1"} <= metrics.keys()
    alone = run(stores[:1], tmp_path / "alone", student=str(taggers["one"][0]), training_arguments={"learning_rate": 0})
    assert metrics["eval_member_accuracy"][stores[0]] == pytest.approx(alone["eval_accuracy"])
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    words = run(stores, tmp_path / "words", student_config=str(tmp_path / "small.json"), ensemble_weights="confidence")
    assert words["eval_member_accuracy"] == pytest.approx(metrics["eval_member_accuracy"])


def test_taggers_that_were_cut_elsewhere(taggers: Any) -> None:
    with pytest.raises(StoreMismatch, match=r"row \d+ of split train has \d+ tokens in .* and 8 in .*: dump both with"):
        ensemble_rows([taggers["one"][1], taggers["cut"][1]], "train", student=str(taggers["one"][0]))


# ---- readers ----


@pytest.fixture(scope="module")
def readers(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("readers")
    train_rows, held = question_cases.squad(12), question_cases.squad(9, seed=5, impossible=True)
    data = f"train={question_cases.write(folder / 'a.jsonl', train_rows)},validation=" + str(
        question_cases.write(folder / "b.jsonl", held)
    )
    made = []
    for seed in (3, 4):
        teacher = question_cases.reader(tiny_tokenizer_dir, folder / f"teacher {seed}", seed=seed)
        more: dict[str, Any] = {"fields": ["logits", "hidden_states"]} if seed == 3 else {}
        dump(question_cases.settings(teacher, data, folder / f"store {seed}", shard_size=10_000 * seed, **more))
        made.append((teacher, str(folder / f"store {seed}")))
    return made


def test_readers_over_the_tokens_of_a_window(readers: Any, tmp_path: Path) -> None:
    stores = [store for _, store in readers]
    _, rows = ensemble_rows(stores, "validation", student="from-teacher-layers:1", teacher=str(readers[0][0]))
    batch, at = rows[list(range(len(rows)))], 0
    tokenizer = AutoTokenizer.from_pretrained(readers[0][0])
    for question in question_cases.squad(9, seed=5, impossible=True):
        windows = question_cases.features(tokenizer, question)
        live = [question_cases.online(teacher, windows) for teacher, _ in readers]
        for number, window in enumerate(windows):
            size = len(window["input_ids"])
            for name, side in (("teacher_start_logits", 0), ("teacher_end_logits", 1)):
                found = torch.from_numpy(batch[name][at])
                assert_same_distribution(found[:size], log_mean(*(each[number][side] for each in live)))
                assert not found[size:].any()
            at += 1
    assert at == len(rows)


def test_readers_are_trained_and_judged(readers: Any, tmp_path: Path) -> None:
    """A member is judged as it is when it is the only teacher."""
    stores = [store for _, store in readers]
    more: dict[str, Any] = {"student": "from-teacher-layers:1", "teacher": str(readers[0][0])}
    metrics = run(stores, tmp_path / "out", ensemble_weights="learned", **more)
    for number, store in enumerate(stores):
        alone = run([store], tmp_path / str(number), **{**more, "teacher": str(readers[number][0])})
        for name in ("exact_match", "f1", "no_answer_accuracy"):
            assert metrics[f"eval_member_{name}"][store] == pytest.approx(alone[f"eval_teacher_{name}"])
    assert metrics["eval_ensemble_f1"] == pytest.approx(metrics["eval_teacher_f1"])
    inside = run(stores, tmp_path / "inside", loss="kl hidden_states:layers=0:0", **more)
    assert inside["eval_ensemble_f1"] > 0, "what is inside is the leading store's"
    with pytest.raises(ConfigError, match="needs the teacher's hidden_states, but the store holds"):
        run(stores[::-1], tmp_path / "x", loss="kl hidden_states", **more)


# ---- language models ----


@pytest.fixture(scope="module")
def models() -> list[Any]:
    shape: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(LlamaForCausalLM(LlamaConfig(**shape, vocab_size=40, initializer_range=0.5)).eval())
    return made


@pytest.mark.parametrize("completion", [False, True])
def test_language_models_with_every_logit(models: Any, tmp_path: Path, completion: bool) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for size in generator.integers(3, 12, 20).tolist():
        ids = generator.integers(1, 40, size).tolist()
        rows.append((ids, [-100] * (size // 2) + ids[size // 2 :] if completion else ids))
    stores, tiny = [], str(tmp_path / "tiny.json")
    for number, model in enumerate(models):

        def logits(ids: Any, model: Any = model) -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=torch.tensor([ids])).logits[0]

        splits = {"train": rows, "validation": rows[:8]}
        write_language(
            tmp_path / str(number), splits, logits, kind="dense", completion=completion, shard_rows=5 + number
        )
        write_language(tmp_path / f"top {number}", splits, logits, kind="top-k")
        stores.append(str(tmp_path / str(number)))
    (tmp_path / "tiny.json").write_text(json.dumps({**models[0].config.to_dict(), "model_type": "llama"}))
    _, found = ensemble_rows(stores, "train", student_config=tiny)
    for at, (ids, _) in enumerate(rows):
        row = found[at]
        with torch.no_grad():
            expected = log_mean(*(model(input_ids=torch.tensor([ids])).logits[0] for model in models))
        kept = row["teacher_mask"] if completion else np.ones(len(ids), bool)
        assert kept.any() and not (completion and kept.all())
        assert_same_distribution(torch.from_numpy(row["teacher_logits"][kept]), expected[torch.from_numpy(kept)])
    metrics = run(stores, tmp_path / "out", student_config=tiny, alpha=0.5)
    assert metrics["eval_loss_logits"] > 0 and metrics["ensemble"]["average"] == "probabilities"
    with pytest.raises(ConfigError, match="--ensemble-weights learned is not for causal-lm"):
        run(stores, tmp_path / "x", student_config=tiny, ensemble_weights="learned")
    top = [str(tmp_path / "top 0"), str(tmp_path / "top 1")]
    with pytest.raises(ConfigError, match="only whole logits are averaged; kept are teacher_top_k_indices"):
        run(top, tmp_path / "x", student_config=tiny, several_stores="ensemble")
    assert "ensemble" not in run(top, tmp_path / "after", student_config=tiny)  # one after another


# ---- images ----


def test_images_view_by_view(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from image_store import convnet, pictures, write_images

    files = {"train": pictures(12), "validation": pictures(6, 9)}
    labels = {split: np.arange(len(one)) % 3 for split, one in files.items()}
    stores = []
    for seed in (1, 2):
        write_images(tmp_path / str(seed), convnet(seed), files, labels, views=2, shard_rows=4 + seed)
        stores.append(str(tmp_path / str(seed)))
    student = convnet(5, (8, 8))
    student.save_pretrained(tmp_path / "student")
    _, rows = ensemble_rows(stores, "train", student=str(tmp_path / "student"))
    assert len(rows) == 24
    batch = rows.narrowed(["teacher_logits"])[[0, 23, 13]]
    with torch.no_grad():
        pixels = torch.from_numpy(batch["pixel_values"])
        expected = log_mean(*(convnet(seed)(pixel_values=pixels).logits for seed in (1, 2)))
    assert_same_distribution(torch.from_numpy(batch["teacher_logits"]), expected)
    metrics = run(stores, tmp_path / "out", student=str(tmp_path / "student"), ensemble_weights="learned")
    assert set(metrics["eval_member_accuracy"]) == set(stores)
    write_images(tmp_path / "other", convnet(3), files, labels, views=2, transforms=("crop",))
    with pytest.raises(StoreMismatch, match="view_flip differs: .* hold other views of the same images"):
        run([stores[0], str(tmp_path / "other")], tmp_path / "x", student=str(tmp_path / "student"))


def test_segmentation_pixel_by_pixel(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from test_segmentation_training import FILES, MASKS, segformer, write_images

    stores = []
    for seed in (1, 2):
        write_images(tmp_path / str(seed), segformer(seed), FILES, MASKS, views=2, shard_rows=2 + seed)
        stores.append(str(tmp_path / str(seed)))
    segformer(5).save_pretrained(tmp_path / "student")
    _, rows = ensemble_rows(stores, "train", student=str(tmp_path / "student"))
    batch = rows[[0, 11, 5]]
    with torch.no_grad():
        pixels = torch.from_numpy(batch["pixel_values"])
        expected = log_mean(*(segformer(seed)(pixel_values=pixels).logits.movedim(1, -1) for seed in (1, 2)))
    assert_same_distribution(torch.from_numpy(batch["teacher_logits"]).movedim(1, -1), expected)
    more: dict[str, Any] = {"student": str(tmp_path / "student"), "training_arguments": {"learning_rate": 0.0}}
    metrics = run(stores, tmp_path / "out", ensemble_weights="confidence", **more)
    for number, store in enumerate(stores):
        args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        held = TeacherStore.open(store).select("validation")
        own = DistillationTrainer(model=segformer(number + 1), args=args, eval_dataset=held).evaluate()
        assert metrics["eval_member_mean_iou"][store] == pytest.approx(own["eval_mean_iou"], abs=1e-5)
    assert 0 < metrics["eval_ensemble_pixel_accuracy"] < 1
    with pytest.raises(ConfigError, match="--ensemble-weights learned is not for semantic-segmentation"):
        run(stores, tmp_path / "x", ensemble_weights="learned", **more)
