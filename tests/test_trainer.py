"""DistillationTrainer: accumulation, online equality, resume, any module, evaluation in source order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classification_store import MISSING, random_rows, write_store
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError, PredistillError
from predistill.student_train.config import DistillationConfig
from predistill.student_train.dataset import ConcatRows
from predistill.student_train.metrics import compute_metrics_for
from predistill.student_train.trainer import DistillationTrainer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

SINGLE = "single_label_classification"
VOCABULARY = 60


def bert(seed: int, layers: int = 1, labels: int = 3, dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32, num_labels=labels, initializer_range=0.3,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long(),
    }


@torch.no_grad()
def logits_by(model, rows):
    return model.eval()(**padded(rows)).logits


@pytest.fixture(scope="module")
def teacher():
    return bert(7, layers=2).eval()


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory) -> TeacherStore:
    """48 training rows, of which the first 12 and every third have no label; 21 rows for validation."""
    rows = {"train": random_rows(48, 1, VOCABULARY), "validation": random_rows(21, 2, VOCABULARY)}
    generator = np.random.default_rng(0)
    logits = {split: logits_by(teacher, part).numpy() for split, part in rows.items()}
    labels = {split: generator.integers(0, 3, len(part)) for split, part in rows.items()}
    labels["train"][:12] = MISSING
    labels["train"][::3] = MISSING
    return write_store(tmp_path_factory.mktemp("stores") / "store", rows, logits, labels)


def arguments(folder: Path, **more) -> DistillationConfig:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1,
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 24, "logging_steps": 1,
    }  # fmt: skip
    return DistillationConfig(**{**settings, **more})


def run(folder, store, student, **more):
    trainer = DistillationTrainer(model=student, args=arguments(folder, **more), train_dataset=store.select("train"))
    trainer.train()
    return trainer, {name: value.detach().clone() for name, value in student.named_parameters()}


def gap(left, right):
    """Largest difference over largest value (a key's bias has no gradient, so not tensor by tensor)."""
    largest = max(float(value.abs().max()) for value in right.values())
    return max(float((left[name] - right[name]).abs().max()) for name in right) / largest


@pytest.mark.parametrize("batch", [1, 4, 6, 12])
def test_accumulation_gives_the_step_of_one_large_batch(store, tmp_path, batch):
    whole, expected = run(tmp_path, store, bert(0))
    pieces, found = run(
        tmp_path, store, bert(0), per_device_train_batch_size=batch, gradient_accumulation_steps=24 // batch
    )
    assert pieces.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-6)
    start = dict(bert(0).named_parameters())
    steps = [{name: (values[name] - start[name]).detach() for name in start} for values in (found, expected)]
    assert gap(*steps) < 1e-6, "a step is the gradient itself: SGD, learning rate 1"
    for name in ("loss_labels", "loss_logits"):
        assert pieces.state.log_history[0][name] == pytest.approx(whole.state.log_history[0][name], rel=1e-6)


def test_accumulation_in_float64_is_exact_and_counts_each_term(store, tmp_path):
    trainer, expected = run(tmp_path, store, bert(0).double())
    _, found = run(tmp_path, store, bert(0).double(), per_device_train_batch_size=4, gradient_accumulation_steps=6)
    assert gap(found, expected) < 1e-12
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(0.3 * logs["loss_labels"] + 0.7 * logs["loss_logits"])


def test_offline_equals_online(store, teacher, tmp_path):
    """The online side is written out: the teacher runs in the loop, the loss is torch's own."""
    trainer, offline = run(tmp_path, store, bert(0), temperature=3.0, alpha=0.6)
    rows = random_rows(48, 1, VOCABULARY)[:24]
    labels = torch.as_tensor(store.select("train").column("labels"))[:24]
    student, known = bert(0).train(), labels != MISSING
    z = student(**padded(rows)).logits
    p = F.softmax(logits_by(teacher, rows) / 3, -1)
    loss = 0.6 * 9 * F.kl_div(F.log_softmax(z / 3, -1), p, reduction="batchmean")
    loss = loss + 0.4 * F.cross_entropy(z[known], labels[known])
    loss.backward()
    start = dict(bert(0).named_parameters())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    steps = {name: (start[name] - offline[name]).detach() for name in start}
    assert gap(steps, {name: one.grad for name, one in student.named_parameters()}) < 1e-6


def test_gradients_of_offline_and_online_agree_to_float32(store, teacher, tmp_path):
    trainer = DistillationTrainer(model=bert(0), args=arguments(tmp_path), train_dataset=store.select("train"))
    batch = next(iter(trainer.get_train_dataloader()))
    offline = {name: value.clone() for name, value in batch.items()}
    online = {
        **offline,
        "teacher_logits": teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
    }
    found = []
    for inputs in (offline, online):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        found.append((loss.item(), {name: one.grad.clone() for name, one in trainer.model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert gap(found[0][1], found[1][1]) < 1e-6


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (3, 0), (5, 0), (2, 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(store, tmp_path, step, workers):
    """In the middle of an epoch (3 optimizer steps each), at its end, and in the second; with dropout."""
    more = {
        "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "group_by_length", "optim": "adamw_torch", "learning_rate": 1e-2,
        "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear", "dataloader_num_workers": workers,
    }  # fmt: skip

    def trained(name, student, callbacks=(), resume=None):
        args = arguments(tmp_path / name, **more)
        trainer = DistillationTrainer(
            model=student, args=args, train_dataset=store.select("train"), callbacks=list(callbacks)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole", bert(0, dropout=0.2))
    trained("part", bert(0, dropout=0.2), [Interrupt(step)])
    rest = trained("part", bert(1, dropout=0.2), resume=True)
    assert rest.state.global_step == whole.state.global_step == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    assert [entry.get("loss") for entry in rest.state.log_history[:6]] == pytest.approx(
        [entry.get("loss") for entry in whole.state.log_history[:6]]
    )


def test_batches_in_process_by_workers_and_by_row_are_the_same(store, tmp_path):
    loaders = []
    for workers in (0, 2):
        args = arguments(
            tmp_path, dataloader_num_workers=workers, per_device_train_batch_size=5,
            train_sampling_strategy="group_by_length", gradient_accumulation_steps=3,
        )  # fmt: skip
        trainer = DistillationTrainer(model=bert(0), args=args, train_dataset=store.select("train"))
        loaders.append(trainer.get_train_dataloader())
    rows, count = store.select("train"), 0
    for left, right, chosen in zip(*loaders, loaders[0].batch_sampler, strict=True):
        assert left.keys() == right.keys() == {"input_ids", "attention_mask", "labels", "teacher_logits"}
        for name in left:
            assert torch.equal(left[name], right[name])
        for row, number in enumerate(chosen):
            ids = rows[number]["input_ids"]
            assert left["input_ids"][row, : len(ids)].tolist() == ids.tolist()
        count += len(chosen)
    assert count == 48


def test_batches_of_one_accumulation_window_do_not_overwrite_each_other(store, tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=8)
    trainer = DistillationTrainer(model=bert(0), args=args, train_dataset=store.select("train"))
    batches = iter(trainer.get_train_dataloader())
    expected = random_rows(48, 1, VOCABULARY)
    for window in range(2):
        held, counts = trainer.get_batch_samples(batches, 8, torch.device("cpu"))
        rows = [
            ids[: mask.sum()].tolist()
            for one in held
            for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True)
        ]
        assert rows == expected[24 * window : 24 * window + 24]
        assert counts[1] == 24


def test_rows_to_evaluate_on_are_evaluated_on_after_every_epoch(store, tmp_path):
    """And a trainer without any trains; what the caller gave as arguments stays as it was."""
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    student = bert(0)
    for more, times in (({"eval_dataset": store.select("validation")}, 2), ({}, 0)):
        trainer = DistillationTrainer(model=student, args=args, train_dataset=store.select("train"), **more)
        trainer.train()
        assert sum("eval_loss" in line for line in trainer.state.log_history) == times
    assert args.eval_strategy == "epoch"
    args = arguments(tmp_path, eval_strategy="steps")
    with pytest.raises(ValueError, match="eval_dataset"):
        DistillationTrainer(model=student, args=args, train_dataset=store.select("train"))


def test_evaluation_is_exact_whatever_the_batches(store, teacher, tmp_path):
    rows, student = random_rows(21, 2, VOCABULARY), bert(0)
    found = []
    for size in (4, 21):
        trainer = DistillationTrainer(
            model=student, args=arguments(tmp_path, per_device_eval_batch_size=size, eval_do_concat_batches=size != 4),
            eval_dataset=store.select("validation"), compute_metrics=compute_metrics_for(SINGLE) if size != 4 else None,
        )  # fmt: skip
        found.append(trainer.evaluate())
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)
    output = trainer.predict(store.select("validation", fields=[]))
    expected, labels = logits_by(student, rows), store.select("validation").column("labels")
    np.testing.assert_allclose(output.predictions, expected, atol=1e-5)
    np.testing.assert_array_equal(output.label_ids, labels)
    assert found[1]["eval_accuracy"] == pytest.approx(float((expected.argmax(-1).numpy() == labels).mean()))
    agreed = (expected.argmax(-1) == logits_by(teacher, rows).argmax(-1)).float().mean().item()
    assert found[0]["eval_teacher_agreement"] == pytest.approx(agreed)
    ce = F.cross_entropy(expected, torch.as_tensor(labels)).item()
    assert found[0]["eval_loss_labels"] == pytest.approx(ce, rel=1e-5)


def test_labels_of_batches_kept_apart_are_not_overwritten(store, tmp_path):
    args = arguments(tmp_path, per_device_eval_batch_size=2, eval_do_concat_batches=False)
    trainer = DistillationTrainer(model=bert(0), args=args, eval_dataset=store.select("validation"))
    output = trainer.predict(store.select("validation"))
    np.testing.assert_array_equal(np.concatenate(output.label_ids), store.select("validation").column("labels"))


class BagOfWords(nn.Module):
    """No transformer: takes ids only and returns a tensor."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).mean(1))


def test_any_module_learns(store, tmp_path):
    torch.manual_seed(0)
    trainer, _ = run(tmp_path, store, BagOfWords(), max_steps=60, optim="adamw_torch", learning_rate=0.05, alpha=1.0)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
def test_heads_of_other_kinds(tmp_path, problem):
    generator, rows = np.random.default_rng(0), {"train": random_rows(24, 1, VOCABULARY)}
    width = 3 if problem == "multi_label" else 1
    labels = generator.integers(0, 2, (24, width)).astype(np.float32)
    labels[:6] = np.nan
    labels[6, 0] = np.nan
    store = write_store(
        tmp_path / "store", rows, {"train": generator.normal(size=(24, width))},
        {"train": labels if width > 1 else labels[:, 0]},
    )  # fmt: skip
    trainer, _ = run(
        tmp_path, store, bert(0, labels=width), per_device_train_batch_size=6, gradient_accumulation_steps=4
    )
    whole, _ = run(tmp_path, store, bert(0, labels=width))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-5)
    kind = f"{problem}_classification" if width > 1 else problem
    trainer = DistillationTrainer(
        model=bert(0, labels=width), args=arguments(tmp_path), eval_dataset=store.select("train"),
        compute_metrics=compute_metrics_for(kind),
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert (
        {"eval_micro_f1", "eval_macro_f1"} <= metrics.keys()
        if width > 1
        else {"eval_mse", "eval_pearson"} <= metrics.keys()
    )


def test_label_only_needs_no_teacher_column(store, tmp_path):
    trainer = DistillationTrainer(
        model=bert(0), args=arguments(tmp_path, alpha=0.0), train_dataset=store.select("train")
    )
    assert "teacher_logits" not in next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert "loss_labels" in trainer.state.log_history[0] and "loss_logits" not in trainer.state.log_history[0]


def test_bf16_autocast(store, tmp_path):
    precise, _ = run(tmp_path, store, bert(0))
    half, _ = run(tmp_path, store, bert(0), bf16=True)
    assert half.state.log_history[0]["loss"] == pytest.approx(precise.state.log_history[0]["loss"], rel=0.05)
    assert half.state.log_history[0]["loss"] != precise.state.log_history[0]["loss"]


def test_a_dataset_of_another_kind_with_the_same_columns(store, tmp_path):
    rows = store.select("train")

    class Listed(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return {name: rows[index][name].tolist() for name in ("input_ids", "labels", "teacher_logits")}

    listed, _ = run(tmp_path, type("Store", (), {"select": lambda *_: Listed()}), bert(0))
    whole, _ = run(tmp_path, store, bert(0))
    assert listed.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-6)


def test_rows_of_several_stores(store, tmp_path):
    both = ConcatRows([store.select("train"), store.select("validation")])
    assert len(both) == 69
    batch, left, right = both[[50, 3, 68]], store.select("train"), store.select("validation")
    for place, row in enumerate((right[2], left[3], right[20])):
        assert batch["input_ids"][place][batch["attention_mask"][place] == 1].tolist() == row["input_ids"].tolist()
        np.testing.assert_array_equal(batch["teacher_logits"][place], row["teacher_logits"])
    assert both[-1]["labels"] == right[20]["labels"]
    trainer = DistillationTrainer(model=bert(0), args=arguments(tmp_path, max_steps=2), train_dataset=both)
    trainer.train()


def test_a_loss_that_is_not_a_number_is_said_clearly(store, tmp_path):
    student = bert(0)
    with torch.no_grad():
        student.classifier.weight[0, 0] = float("nan")
    with pytest.raises(PredistillError, match="the labels term is not a number by step 1: lower --learning-rate"):
        run(tmp_path, store, student)


def test_clear_refusals(store, tmp_path):
    with pytest.raises(ConfigError, match="compute_loss_func"):
        DistillationTrainer(model=bert(0), args=arguments(tmp_path), compute_loss_func=print)
    with pytest.raises(ConfigError, match="train-sampling-strategy"):
        arguments(tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(ConfigError, match="label-smoothing"):
        arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(PredistillError, match="5 labels, the store's teacher has 3"):
        run(tmp_path, store, bert(0, labels=5))
