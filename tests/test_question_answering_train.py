"""Readers trained from stores: the loss is that of a live teacher, the scores are those of the usual evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dump_cases import own_cache  # noqa: F401  a fixture
from oracle_cases import DTYPES, assert_reproduced, cases_of
from predistill.store import ConfigError, StoreMismatch, TeacherStore
from predistill.student_train.config import DistillationConfig
from predistill.student_train.losses.terms import Term, mixture, parse_loss
from predistill.student_train.settings import TrainConfig
from predistill.student_train.tasks.question_answering import SpanObjective
from predistill.student_train.train import train
from predistill.student_train.trainer import DistillationTrainer
from predistill.teacher_dump.dump import dump
from question_cases import features, online, reader, settings, squad, write
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

ROWS, HELD = squad(20), squad(14, seed=5, impossible=True)
FAST = {"use_cpu": True, "num_train_epochs": 1, "learning_rate": 1e-3}
LOSSES = ("kl", "reverse_kl", "jsd", "total_variation", "soft_cross_entropy", "mse", "dkd", "kl:standardize")


@pytest.fixture(scope="module")
def teacher(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reader(tiny_tokenizer_dir, tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def folder(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("store")
    data = f"train={write(made / 'a.jsonl', ROWS)},validation={write(made / 'b.jsonl', HELD)}"
    dump(settings(teacher, data, made / "s", fields=["logits", "hidden_states", "attentions"], shard_size=400_000))
    return made / "s"


def run(folder: Path, output: Path, teacher: Path, **more: Any) -> dict[str, Any]:
    arguments = {**FAST, **more.pop("training_arguments", {})}
    chosen = {"student": "from-teacher-layers:1", "teacher": str(teacher), **more}
    return train({"stores": [str(folder)], "output_dir": str(output), "training_arguments": arguments, **chosen})


# ---- the loss ----


def test_offline_equals_online(folder: Path, teacher: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """A batch of the store against both models run live, a window at a time, by plain torch: loss and gradients."""
    student = AutoModelForQuestionAnswering.from_pretrained(
        reader(tiny_tokenizer_dir, tmp_path / "t", 1, seed=9)
    ).eval()
    windows = [one for row in ROWS[:5] for one in features(AutoTokenizer.from_pretrained(teacher), row)]
    objective, temperature = SpanObjective(mixture(0.6, Term("logits", "kl", temperature=3.0))), 3.0
    with TeacherStore.open(folder) as store:
        rows = store.select("train", fields=objective.fields)[list(range(len(windows)))]
    batch = {name: torch.from_numpy(value) for name, value in rows.items()}
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    offline = objective.step(student, inputs, batch, objective.counts(batch)).loss
    ours = torch.autograd.grad(offline, list(student.parameters()), allow_unused=True, materialize_grads=True)

    total = torch.zeros(())
    for window, logits in zip(windows, online(teacher, windows), strict=True):
        outputs = student(**{name: torch.tensor([window[name]]) for name in ("input_ids", "token_type_ids")})
        own_logits, labels = (outputs.start_logits, outputs.end_logits), (window["start"], window["end"])
        for own, theirs, label in zip(own_logits, logits, labels, strict=True):
            q, p = (own[0] / temperature).log_softmax(-1), (theirs / temperature).softmax(-1)
            hard, soft = F.cross_entropy(own, torch.tensor([label])), F.kl_div(q, p, reduction="sum") * temperature**2
            total = total + (0.4 * hard + 0.6 * soft) / 2 / len(windows)
    theirs = torch.autograd.grad(total, list(student.parameters()), allow_unused=True, materialize_grads=True)
    assert abs(offline - total) <= 1e-6 * abs(total)
    largest = max(one.abs().max() for one in theirs)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) <= 1e-6 * largest


def padded_batch(longer: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Student logits [3, 2, 9 + longer] and a batch of rows of 9, 6 and 4 tokens; the padding is full of traps."""
    generator = torch.Generator().manual_seed(0)
    own, taught = torch.randn(2, 3, 2, 9, generator=generator, dtype=torch.float64) * 3
    mask = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
    own, taught = (F.pad(each.masked_fill(~mask[:, None], 40.0), (0, longer), value=50.0) for each in (own, taught))
    positions = torch.tensor([[2, 4], [0, 0], [-100, -100]])
    batch = {
        "attention_mask": F.pad(mask.long(), (0, longer)), "start_positions": positions[:, 0],
        "end_positions": positions[:, 1], "teacher_start_logits": taught[:, 0], "teacher_end_logits": taught[:, 1],
    }  # fmt: skip
    return own.requires_grad_(), batch


@pytest.mark.parametrize("loss", [*LOSSES, "labels", "pseudo_labels"])
def test_padding_is_no_token(loss: str) -> None:
    """In every loss: the same as of each row alone, whatever stands in its padding."""
    term = Term(loss) if "labels" in loss else parse_loss(loss + (":" if ":" not in loss else ",") + "temperature=2")
    objective, found = SpanObjective([term]), []
    for longer in (0, 7):
        own, batch = padded_batch(longer)
        value = objective.sums(own, batch)[0]
        (slope,) = torch.autograd.grad(value, own)
        assert not slope[..., 9:].any() and not slope[2, :, 4:].any() and torch.isfinite(slope).all()
        found.append((value, slope[..., :9], objective.counts(batch)))
    (value, slope, counts), (other, also, same) = found
    torch.testing.assert_close(value, other)
    torch.testing.assert_close(slope, also)
    assert counts.tolist() == same.tolist() == [{"labels": 2, "pseudo_labels": 1}.get(loss, 3)]
    own, batch = padded_batch(0)
    alone = torch.zeros((), dtype=torch.float64)
    for row, size in enumerate((9, 6, 4)):
        cut = {name: one[row : row + 1, :size] if one.ndim > 1 else one[row : row + 1] for name, one in batch.items()}
        alone += objective.sums(own[row : row + 1, :, :size], cut)[0]
    torch.testing.assert_close(value, alone)


def test_pseudo_labels_of_those_that_the_teacher_is_sure_of() -> None:
    own, batch = padded_batch(0)
    for name in ("teacher_start_logits", "teacher_end_logits"):
        batch[name] = torch.where(torch.arange(9) == 1, 2.0, torch.zeros(3, 9))
    sure = torch.tensor([2.0, 0, 0, 0]).softmax(0)[0].item()
    counts = [
        SpanObjective([Term("pseudo_labels", options={"threshold": sure + gap})]).counts(batch) for gap in (-0.01, 0.01)
    ]
    assert torch.cat(counts).tolist() == [1, 0]


def haystack(case: Any) -> torch.Tensor:
    """What Haystack adds of start and end, ours averages; no padding in the recorded cases."""
    if case["student_logits"].ndim < 3:
        pytest.skip("its logits are no spans")
    own, taught = case["student_logits"].transpose(1, 2), case["teacher_logits"].transpose(1, 2)
    weight, name = case.params["distillation_loss_weight"], case.params["distillation_loss"]
    term = TrainConfig(stores=["s"], student="x", output_dir="o", distillation_loss=name, alpha=1.0,
                       temperature=case.params["temperature"]).terms()[0]  # fmt: skip
    batch = {
        "attention_mask": torch.ones(own.shape[0], own.shape[-1]), "teacher_start_logits": taught[:, 0],
        "teacher_end_logits": taught[:, 1],
    }  # fmt: skip
    mean = SpanObjective([term]).sums(own, batch)[0] / len(own)
    return weight * mean * (2 if name == "kl_div" else 1) + (1 - weight) * case["student_loss"].mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("line", cases_of({"haystack_prediction_layer": haystack}))
def test_haystacks_prediction_layer(line: dict, dtype: torch.dtype) -> None:
    assert_reproduced(line, dtype, haystack)


# ---- runs ----


def reference(teacher: Path, rows: list[dict[str, Any]]) -> list[str]:
    """The teacher's answers, every span of every window tried, as SQuAD 2.0 chooses."""
    tokenizer, said = AutoTokenizer.from_pretrained(teacher), []
    for row in rows:
        best, none = (-np.inf, 0, 0), np.inf
        windows = features(tokenizer, row)
        for window, (start, end) in zip(windows, online(teacher, windows), strict=True):
            none = min(none, float(start[0] + end[0]))
            mine = [at for at, (begin, _) in enumerate(window["offsets"]) if begin >= 0]
            for i in mine:
                for j in range(i, min(i + 30, mine[-1] + 1)):
                    best = max(best, (float(start[i] + end[j]), window["offsets"][i][0], window["offsets"][j][1]))
        said.append("" if none > best[0] else row["context"][best[1] : best[2]])
    return said


def test_the_teachers_own_layers_answer_as_it_does(folder: Path, teacher: Path, tmp_path: Path) -> None:
    from torchmetrics.functional.text import squad as metric

    fixed = {"training_arguments": {"learning_rate": 0.0}}
    metrics = run(folder, tmp_path / "out", teacher, student="from-teacher-layers:1,2", **fixed)
    assert metrics["eval_teacher_agreement"] == 1 and metrics["eval_loss_logits"] == pytest.approx(0, abs=1e-6)
    said = [{"id": str(at), "prediction_text": text} for at, text in enumerate(reference(teacher, HELD))]
    truths: Any = [
        {"id": str(at), "answers": {"text": row["answers"]["text"] or [""], "answer_start": [0]}}
        for at, row in enumerate(HELD)
    ]
    for name, value in metric(said, truths).items():
        assert metrics[f"eval_{name}"] == metrics[f"eval_teacher_{name}"] == pytest.approx(float(value), abs=1e-4)
    assert {"eval_has_answer_f1", "eval_no_answer_accuracy"} <= metrics.keys()
    out = tmp_path / "out"
    AutoModelForQuestionAnswering.from_pretrained(out)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "pipeline" not in code and "pipeline_tag: question-answering" in (out / "README.md").read_text()
    exec(code.replace("path/to/this/folder", str(out)), {})


def test_thresholds_lengths_and_several_stores(folder: Path, teacher: Path, tmp_path: Path) -> None:
    fixed = {"training_arguments": {"learning_rate": 0.0}, "student": "from-teacher-layers:1,2"}
    none = run(folder, tmp_path / "none", teacher, no_answer_threshold=-1e6, **fixed)
    some = run(folder, tmp_path / "some", teacher, no_answer_threshold=1e6, **fixed)
    assert none["eval_no_answer_accuracy"] == 100 and some["eval_no_answer_accuracy"] == 0
    assert none["eval_has_answer_f1"] == 0
    store = TeacherStore.open(folder)
    shutil.copytree(folder, tmp_path / "copy")
    twice = train({"stores": [str(folder), str(tmp_path / "copy")], "output_dir": str(tmp_path / "two"),
                   "teacher": str(teacher), "student": "from-teacher-layers:1,2",
                   "no_answer_threshold": 1e6, "max_answer_length": 30,
                   "training_arguments": {**FAST, "learning_rate": 0.0}})  # fmt: skip
    assert twice["eval_f1"] == pytest.approx(some["eval_f1"]) and twice["eval_teacher_agreement"] == 1
    store.close()


def test_a_trainer_alone_judges_too(folder: Path, teacher: Path, tmp_path: Path) -> None:
    with TeacherStore.open(folder) as store:
        rows = store.select("validation")
        args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_answer_length=1)
        model = AutoModelForQuestionAnswering.from_pretrained(teacher)
        found = DistillationTrainer(model=model, args=args, eval_dataset=rows)
        metrics = found.evaluate()
        assert metrics["eval_teacher_agreement"] == 1 and metrics["eval_f1"] > 0
        kept = np.asarray(found.predict(rows).predictions)  # type: ignore[arg-type]
        lengths = kept[:, 0, 1:, 2] - kept[:, 0, 1:, 1]
        assert kept.shape == (len(rows), 2, 21, 3) and lengths.max() == 8  # of one token: charming
        with pytest.raises(ConfigError, match="compute_metrics would need"):
            DistillationTrainer(model=model, args=args, eval_dataset=rows, compute_metrics=lambda _: {}).evaluate()


def test_haystack_in_two_stages(folder: Path, teacher: Path, tmp_path: Path) -> None:
    epochs = {"num_train_epochs": 1}
    metrics = run(
        folder, tmp_path / "out", teacher, preset="haystack", distillation_loss="mse", training_arguments=epochs
    )
    assert set(metrics["stages"]) == {"intermediate", "prediction"} and metrics["eval_exact_match"] >= 0
    made = json.loads((tmp_path / "out" / "predistill.json").read_text())
    assert [(term["name"], term["loss"], term["weight"]) for term in made["terms"]] == [
        ("labels", "cross_entropy", 0.5), ("logits", "mse", 0.5),
    ]  # fmt: skip


def test_labels_alone_and_rows_without_any(teacher: Path, tmp_path: Path) -> None:
    rows = [{**row, "answers": None if at % 2 else row["answers"]} for at, row in enumerate(ROWS)]
    dump(settings(teacher, f"train={write(tmp_path / 'a.jsonl', rows)}", tmp_path / "s"))
    labels = run(tmp_path / "s", tmp_path / "labels", teacher, alpha=0.0)
    everything = run(tmp_path / "s", tmp_path / "both", teacher, alpha=0.5, pseudo_labels=0.5)
    counts = [json.loads((tmp_path / name / "predistill.json").read_text())["rows"] for name in ("labels", "both")]
    assert labels["train_loss"] > 0 and everything["train_loss"] > 0 and 0 < counts[0] < counts[1]


def test_an_interrupted_run_goes_on(folder: Path, teacher: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    more = {"training_arguments": {"num_train_epochs": 2, "save_strategy": "epoch"}}
    run(folder, tmp_path / "whole", teacher, **more)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    last = max((tmp_path / "part").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    (tmp_path / "part" / "model.safetensors").unlink()
    run(folder, tmp_path / "part", teacher, resume_from_checkpoint="true", **more)
    whole, rest = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


# ---- settings ----


def configured(**more: Any) -> TrainConfig:
    return TrainConfig(stores=["s"], student="x", output_dir="o", **more)


def test_haystacks_names() -> None:
    by_ours = configured(loss="mse", alpha=0.3, temperature=4.0)
    by_theirs = configured(distillation_loss="mse", distillation_loss_weight=0.3, temperature=4.0)
    assert by_ours == by_theirs and configured(distillation_loss="kl_div").terms() == configured().terms()
    stages = {"one": {"distillation_loss_weight": 0.2}, "two": {"distillation_loss": "mse"}}
    first, second = configured(stages=stages, alpha=0.9).recipe()
    assert [term.weight for term in first.terms] == pytest.approx([0.8, 0.2]) and second.terms[1].loss == "mse"
    weights = [term.weight for term in configured(preset="haystack", distillation_loss_weight=0.25).recipe()[1].terms]
    assert weights == [0.75, 0.25]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"distillation_loss": "huber"}, "--distillation-loss is one of kl_div, mse; got 'huber'"),
        ({"distillation_loss": "mse", "loss": "jsd"}, "--distillation-loss is --loss by another name"),
        ({"distillation_loss_weight": 0.3, "alpha": 0.3}, "--distillation-loss-weight is --alpha by another name"),
        ({"distillation_loss_weight": 3.0}, "--alpha lies between 0 and 1; got 3.0"),
        ({"max_answer_length": 0}, "--max-answer-length lies between 1"),
    ],
)
def test_bad_settings(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(**more)


def test_what_is_refused(folder: Path, teacher: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    from predistill.student_train.tasks import check_known

    with pytest.raises(ConfigError, match="--no-answer-threshold is nothing that causal-lm knows"):
        check_known(SimpleNamespace(task="causal-lm"), configured(no_answer_threshold=1.0))
    with pytest.raises(ConfigError, match="nlp_architect_mse is not defined where rows differ in length"):
        run(folder, tmp_path / "x", teacher, loss="nlp_architect_mse")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    made = json.loads((other / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    vocabulary["film"], vocabulary["plot"] = vocabulary["plot"], vocabulary["film"]
    (other / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(
        StoreMismatch, match=r"tokenizer differs: store \w+, student \w+ .*vocabularies.* a reader learns"
    ):
        run(folder, tmp_path / "y", teacher, student=str(other))
    dump(settings(teacher, write(tmp_path / "a.jsonl", ROWS[:4]), tmp_path / "s", fields=["hidden_states"]))
    with pytest.raises(ConfigError, match="has no teacher_start_logits, but .*: dump --fields logits"):
        run(tmp_path / "s", tmp_path / "z", teacher)
