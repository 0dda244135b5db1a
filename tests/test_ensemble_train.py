"""`train` on several stores of the same rows: which stores are an ensemble, what is said of it, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classification_store import MISSING, random_rows, write_store
from dump_cases import bert, own_cache, rows, settings, write  # noqa: F401  a fixture
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError, StoreMismatch
from predistill.student_train.train import train
from predistill.teacher_dump.dump import dump
from transformers import AutoTokenizer

FAST = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "max_steps": 4, "use_cpu": True}
NAMES = ["no", "yes"]
COUNTS = {"train": 40, "validation": 30, "tune": 30}


@pytest.fixture(scope="module")
def student_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("students") / "tiny.json"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    path.write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 64, **shape}))
    return str(path)


@pytest.fixture(scope="module")
def store_of(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A teacher of the same rows, of which `right` are classified well; `change` makes them other rows."""
    folder, tokenizer = tmp_path_factory.mktemp("stores"), AutoTokenizer.from_pretrained(tiny_tokenizer_dir)

    def make(name: str, seed: int = 0, right: float = 1.0, change: Any = None, names: Any = NAMES, **more: Any) -> str:
        splits, logits, labels = {}, {}, {}
        generator = np.random.default_rng(seed)
        for number, (split, count) in enumerate(COUNTS.items()):
            found = [[7 + at % 2, *row] for at, row in enumerate(random_rows(count, number))]
            splits[split] = change(split, found) if change else found
            truth = np.arange(len(splits[split])) % 2
            known = generator.random(len(truth)) < right
            z = np.where(known, 1, -1)[:, None] * (np.eye(2)[truth] * 4 - 2) + generator.normal(0, 0.5, (len(truth), 2))
            logits[split] = z if list(names or NAMES) == NAMES else z[:, ::-1]
            labels[split] = truth if list(names or NAMES) == NAMES else 1 - truth
        labels["train"][5::4] = MISSING
        options = {"tokenizer": tokenizer, "tokenizer_dir": tiny_tokenizer_dir, "label_names": names, **more}
        write_store(folder / name, splits, logits, labels, identity={"teacher": {"name": f"org/{name}"}}, **options)
        return str(folder / name)

    return make


@pytest.fixture(scope="module")
def stores(store_of: Callable[..., str]) -> list[str]:
    """Good, fair and poor."""
    return [store_of(f"teacher-{seed}", seed, right) for seed, right in ((1, 0.95), (2, 0.8), (3, 0.55))]


def run(stores: list[str], student_config: str, output: Path, **more: Any) -> dict[str, Any]:
    arguments = {**FAST, **more.pop("training_arguments", {})}
    return train({"stores": stores, "student_config": student_config, "output_dir": str(output),
                  "training_arguments": arguments, **more})  # fmt: skip


def accuracy(z: np.ndarray, labels: np.ndarray) -> float:
    return float((z.argmax(1) == labels).mean())


def columns(stores: list[str], split: str, name: str = "teacher_logits") -> np.ndarray:
    return np.stack([TeacherStore.open(path).select(split).column(name) for path in stores])


def ids_of(store: TeacherStore) -> dict[str, list[list[int]]]:
    return {split: [row.tolist() for row in token_rows(store, split)] for split in COUNTS}


def token_rows(store: TeacherStore, split: str) -> list[np.ndarray]:
    rows = store.select(split)
    return [rows[at]["input_ids"] for at in range(len(rows))]


def softmax(z: np.ndarray) -> np.ndarray:
    exponents = np.exp(z - z.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


# ---- an ensemble ----


def test_stores_of_the_same_rows_are_an_ensemble(
    stores: list[str], student_config: str, tmp_path: Path, capfd: Any
) -> None:
    metrics = run(stores, student_config, tmp_path / "out")
    said = capfd.readouterr().err
    assert "an ensemble: 3 stores speak of the same rows (40 of train, 30 of validation)" in said
    assert "probabilities averaged, weights equal" in said
    z, labels = columns(stores, "validation"), columns(stores[:1], "validation", "labels")[0]
    assert metrics["eval_ensemble_accuracy"] == pytest.approx(accuracy(softmax(z).mean(0), labels))
    expected = {path: pytest.approx(accuracy(one, labels)) for path, one in zip(stores, z, strict=True)}
    assert metrics["eval_member_accuracy"] == expected
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    made = json.loads((tmp_path / "out" / "predistill.json").read_text())
    assert made["rows"] == 40 and [one["name"] for one in made["stores"]] == stores
    assert made["ensemble"] == metrics["ensemble"]
    assert made["ensemble"]["weights"] == {path: pytest.approx(1 / 3) for path in stores}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`org/teacher-1`, `org/teacher-2`, `org/teacher-3`" in card and "probabilities averaged" in card
    assert str(tmp_path) not in card and "/teacher-2`" in card


def test_it_teaches_what_one_store_of_the_average_teaches(
    stores: list[str], store_of: Callable[..., str], student_config: str, tmp_path: Path
) -> None:
    """Weights of the student are those that a single store of log p would have given it."""
    single = TeacherStore.open(stores[0])
    logits = {split: np.log(np.tensordot([0.5, 0.3, 0.2], softmax(columns(stores, split).astype(np.float64)), 1))
              for split in COUNTS}  # fmt: skip
    labels = {split: single.select(split).column("labels") for split in COUNTS}
    splits = ids_of(single)
    tokenizer_dir = single.tokenizer_dir
    write_store(tmp_path / "average", splits, logits, labels, label_names=NAMES, tokenizer_dir=tokenizer_dir,
                tokenizer=AutoTokenizer.from_pretrained(tokenizer_dir))  # fmt: skip
    fixed: dict[str, Any] = {"alpha": 0.8, "temperature": 3.0}
    one = run([str(tmp_path / "average")], student_config, tmp_path / "one", **fixed)
    three = run(stores, student_config, tmp_path / "three", ensemble_weights="5,3,2", **fixed)
    assert three["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert three["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert three["eval_teacher_agreement"] == one["eval_teacher_agreement"]


def test_learned_weights_favour_the_better_teacher(
    stores: list[str], student_config: str, tmp_path: Path, capfd: Any
) -> None:
    metrics = run(stores[::-1], student_config, tmp_path / "out", ensemble_weights="learned", ensemble_split="tune")
    weights = metrics["ensemble"]["weights"]
    assert list(weights) == stores[::-1] and sum(weights.values()) == pytest.approx(1)
    assert weights[stores[0]] > 0.5 > weights[stores[2]]
    assert "weights learnt from 30 labels of tune" in capfd.readouterr().err
    z, labels = columns(stores, "validation"), columns(stores[:1], "validation", "labels")[0]
    own = np.tensordot([weights[path] for path in stores], softmax(z), 1)
    assert metrics["eval_ensemble_accuracy"] == pytest.approx(accuracy(own, labels))


@pytest.mark.parametrize(
    "more",
    [
        {"ensemble_weights": "confidence"},
        {"ensemble_average": "logits", "ensemble_weights": "0,1,1"},
        {"ensemble_weights": "learned", "preset": "tutorial"},
        {"alpha": 0.0},
        {"pseudo_labels": 1.0, "pseudo_label_confidence": 0.6},
        {"where": "label IS NULL"},
        {"eval_split": "tune"},
    ],
)
def test_settings(stores: list[str], student_config: str, tmp_path: Path, more: dict[str, Any]) -> None:
    metrics = run(stores, student_config, tmp_path / "out", **more)
    assert 0 < metrics["eval_ensemble_accuracy"] <= 1
    if "where" in more:
        made = json.loads((tmp_path / "out" / "predistill.json").read_text())
        assert made["rows"] == 9, "those of the leading store"
    if more.get("ensemble_weights") == "0,1,1":
        assert metrics["ensemble"]["weights"][stores[0]] == 0


def test_classes_in_another_order(
    stores: list[str], store_of: Callable[..., str], student_config: str, tmp_path: Path, capfd: Any
) -> None:
    turned = store_of("turned", 1, 0.95, names=["Yes", "no "])
    metrics = run([stores[0], turned], student_config, tmp_path / "out")
    said = capfd.readouterr().err
    assert "in another order: they are put in order by name" in said and "differ between" not in said
    assert metrics["eval_member_accuracy"][turned] == metrics["eval_member_accuracy"][stores[0]] > 0.8
    assert metrics["eval_ensemble_accuracy"] == metrics["eval_member_accuracy"][stores[0]]
    unnamed = store_of("unnamed", 2, names=None)
    run([stores[0], unnamed], student_config, tmp_path / "unnamed")
    assert "does not name its classes" in capfd.readouterr().err
    other = store_of("other names", 2, names=["no", "maybe"])
    with pytest.raises(StoreMismatch, match=r'class 1 of .* is \'yes\', and .* has \["no", "maybe"\]'):
        run([stores[0], other], student_config, tmp_path / "x")


def test_other_tokenizers_and_which_store_leads(tiny_tokenizer_dir: Path, tmp_path: Path, capfd: Any) -> None:
    """Two teachers, two tokenizers: the student reads the tokens of the store whose tokenizer is its own."""
    data = f"train={write(tmp_path / 'a.jsonl', rows(24))},validation={write(tmp_path / 'b.jsonl', rows(10, 3))}"
    plain = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    plain.train_new_from_iterator([row["text"] for row in rows(24)], 60).save_pretrained(tmp_path / "letters")
    folders = []
    for name, tokenizer_dir in (("words", tiny_tokenizer_dir), ("letters", tmp_path / "letters")):
        teacher, folder = bert(tokenizer_dir, tmp_path / f"teacher of {name}"), tmp_path / f"store of {name}"
        dump(settings(teacher, data, folder, keep_columns=["text"]))
        folders.append(str(folder))
    (tmp_path / "out").mkdir()
    for number, student in enumerate(("words", "letters")):
        made = {"stores": folders, "student": str(tmp_path / f"teacher of {student}"), "training_arguments": FAST,
                "output_dir": str(tmp_path / "out" / student)}  # fmt: skip
        metrics = train(made)
        told = json.loads((tmp_path / "out" / student / "predistill.json").read_text())
        assert metrics["ensemble"]["leading"] == folders[number] and not told["student"]["retokenized"]
        assert list(metrics["eval_member_accuracy"]) == folders
    third = bert(tmp_path / "letters", tmp_path / "third")
    AutoTokenizer.from_pretrained(tmp_path / "letters").train_new_from_iterator(["a b"], 30).save_pretrained(third)
    train({"stores": folders, "student": str(third), "training_arguments": FAST, "output_dir": str(tmp_path / "3")})
    assert json.loads((tmp_path / "3" / "predistill.json").read_text())["student"]["retokenized"]
    with pytest.raises(StoreMismatch, match="tokenizer differs"):
        train({"stores": folders, "student": str(third), "output_dir": str(tmp_path / "4"), "training_arguments": FAST,
               "several_stores": "concatenate"})  # fmt: skip


def test_numbers_and_several_labels(tiny_tokenizer_dir: Path, student_config: str, tmp_path: Path) -> None:
    splits = {"train": random_rows(20), "validation": random_rows(12, 1)}
    generator = np.random.default_rng(0)
    for name, width in (("numbers", 1), ("several", 3)):
        made, outputs = [], []
        for seed in range(2):
            z = {split: generator.normal(0, 1, (len(one), width)) for split, one in splits.items()}
            truth: Any = {split: np.sign(np.arange(len(one)) % 3 - 1.0) for split, one in splits.items()}
            if width > 1:
                truth = {split: (generator.random((len(one), width)) > 0.5).astype(np.float32) for split, one in
                         splits.items()}  # fmt: skip
            kind = "regression" if width == 1 else "multi_label_classification"
            folder = tmp_path / f"{name} {seed}"
            write_store(folder, splits, z, truth, tokenizer_dir=tiny_tokenizer_dir, settings={"problem_type": kind})
            made.append(str(folder))
            outputs.append((z["validation"], truth["validation"]))
        for weights in ("equal", "learned"):
            found = run(made, student_config, tmp_path / f"{name} {weights}", loss="mse", ensemble_weights=weights)
            assert sum(found["ensemble"]["weights"].values()) == pytest.approx(1)
            if width == 1 and weights == "equal":
                mean = (outputs[0][0] + outputs[1][0])[:, 0] / 2
                error = np.mean((mean.astype(np.float32) - outputs[0][1]) ** 2)
                assert found["eval_ensemble_mse"] == pytest.approx(float(error), rel=1e-5)
        if width == 1:
            with pytest.raises(ConfigError, match="a regression has none"):
                run(made, student_config, tmp_path / "x", ensemble_weights="confidence")


# ---- not an ensemble ----


def test_stores_without_a_row_in_common(store_of: Callable[..., str], stores: list[str], student_config: str,
                                        tmp_path: Path, capfd: Any) -> None:  # fmt: skip
    other = store_of("apart", change=lambda _, found: [[5, *row] for row in found])
    metrics = run([stores[0], other], student_config, tmp_path / "out")
    assert "2 stores without a row of split train in common: read one after another" in capfd.readouterr().err
    assert "ensemble" not in metrics
    assert json.loads((tmp_path / "out" / "predistill.json").read_text())["rows"] == 80
    forced = run(stores[:2], student_config, tmp_path / "forced", several_stores="concatenate")
    assert "ensemble" not in forced
    assert json.loads((tmp_path / "forced" / "predistill.json").read_text())["rows"] == 80
    with pytest.raises(ConfigError, match="--ensemble-average is for an ensemble .* without a row of train in common"):
        run([stores[0], other], student_config, tmp_path / "x", ensemble_average="logits")


def one_changed(split: str, found: list[list[int]]) -> list[list[int]]:
    return [*found[:7], [9, 9, 9], *found[8:]] if split == "train" else found


def turned_round(split: str, found: list[list[int]]) -> list[list[int]]:
    return found[::-1]


def other_evaluation(split: str, found: list[list[int]]) -> list[list[int]]:
    return [[5, *row] for row in found] if split == "validation" else found


@pytest.mark.parametrize("forced", ["auto", "ensemble"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_changed, r"of split train, .* has 40 rows, .* 40, 39 in common; the first row that differs is source_index"
                      r" 7, content [0-9a-f]{8}… in the first, [0-9a-f]{8}… in the second"),
        (lambda _, found: found[:33], r"40 rows, .* 33, 33 in common; .* source_index 33, .* not in the second"),
        (turned_round, r"0 in common \(40 have content of the first, at other places\)"),
        (other_evaluation, r"of split validation, .* 30, 0 in common"),
    ],
)  # fmt: skip
def test_anything_between_is_refused(store_of: Callable[..., str], stores: list[str], student_config: str,
                                     tmp_path: Path, change: Any, message: str, forced: str) -> None:  # fmt: skip
    other = store_of(tmp_path.name, change=change)
    with pytest.raises(StoreMismatch, match=message):
        run([stores[0], other], student_config, tmp_path / "out", several_stores=forced)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "more", "error", "message"),
    [
        (1, {"ensemble_average": "logits"}, ConfigError, "--ensemble-average is for an ensemble .*; this is one store"),
        (1, {"several_stores": "ensemble"}, ConfigError, "--several-stores is for an ensemble"),
        (2, {"several_stores": "both"}, ConfigError, "--several-stores is one of auto, ensemble, concatenate"),
        (2, {"ensemble_average": "median"}, ConfigError, "--ensemble-average is one of probabilities, logits"),
        (2, {"ensemble_weights": "1,2,3"}, ConfigError, "a number for each of 2 stores expected; got 3"),
        (2, {"ensemble_weights": "most"}, ConfigError, "one of equal, learned, confidence, or numbers"),
        (2, {"ensemble_weights": "1,-1"}, ConfigError, "or numbers from 0 on"),
        (2, {"ensemble_weights": "0,0"}, ConfigError, "or numbers from 0 on"),
        (2, {"ensemble_split": "tune"}, ConfigError, "--ensemble-split is for --ensemble-weights learned"),
        (2, {"ensemble_weights": "learned", "ensemble_split": "dev"}, ConfigError, "has no split dev to learn"),
        (2, {"ensemble_weights": "learned", "several_stores": "concatenate"}, ConfigError, "is for an ensemble"),
        (2, {"train_split": "dev"}, ConfigError, "split 'dev' is not there"),
        (2, {"loss": "hidden_states"}, ConfigError, "needs the teacher's hidden_states, but the store holds"),
    ],
)  # fmt: skip
def test_clear_refusals(stores: list[str], student_config: str, tmp_path: Path, count: int, more: dict[str, Any],
                        error: type[Exception], message: str) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        run(stores[:count], student_config, tmp_path / "out", **more)


def test_labels_that_differ_are_told_and_no_labels_teach_no_weights(
    store_of: Callable[..., str], stores: list[str], student_config: str, tmp_path: Path, capfd: Any
) -> None:
    store = TeacherStore.open(stores[0])
    rows_of = ids_of(store)
    logits = {split: store.select(split).column("teacher_logits") for split in COUNTS}
    labels = {split: 1 - np.arange(count) % 2 for split, count in COUNTS.items()}
    none = {split: np.full_like(one, MISSING) for split, one in labels.items()}
    for name, own in (("wrong", labels), ("unlabelled", none)):
        write_store(tmp_path / name, rows_of, logits, own, label_names=NAMES, tokenizer_dir=store.tokenizer_dir,
                    tokenizer=AutoTokenizer.from_pretrained(store.tokenizer_dir))  # fmt: skip
    run([stores[0], str(tmp_path / "wrong")], student_config, tmp_path / "out")
    assert "labels of 31 rows of train differ between" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="split validation has no labelled row to learn --ensemble-weights from"):
        run([str(tmp_path / "unlabelled"), stores[0]], student_config, tmp_path / "x", ensemble_weights="learned")
    metrics = run([str(tmp_path / "unlabelled"), stores[0]], student_config, tmp_path / "y")
    assert "eval_ensemble_accuracy" not in metrics and metrics["ensemble"]["average"] == "probabilities"


def test_a_run_is_resumed_with_the_same_weights(stores: list[str], student_config: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"ensemble_weights": "learned"}
    whole = run(stores, student_config, tmp_path / "out", training_arguments={"save_steps": 2}, **more)
    again = run(stores, student_config, tmp_path / "out", resume_from_checkpoint="true", **more)
    assert again["eval_loss"] == pytest.approx(whole["eval_loss"]) and again["ensemble"] == whole["ensemble"]
    assert torch.isfinite(torch.tensor(again["eval_loss"]))
