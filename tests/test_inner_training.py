"""Training on the inside of a teacher: accumulation, checkpoints of projections, what is saved, ranks, decoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from classification_store import random_rows
from inner_cases import VOCABULARY, bert, write_inside
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError
from predistill.student_train.config import DistillationConfig
from predistill.student_train.inside.objective import InnerObjective
from predistill.student_train.inside.projections import FILE, projections_of
from predistill.student_train.losses.terms import Term
from predistill.student_train.tasks import task_of
from predistill.student_train.trainer import DistillationTrainer
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

LOGITS = (Term("logits"),)
INNER = (Term("hidden_states"), Term("attentions", weight=10.0), Term("relations", "minilm"))


def llama(seed: int, layers: int, width: int, heads: int, key_heads: int):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, intermediate_size=32, max_position_embeddings=32, initializer_range=0.3,
            pad_token_id=0,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TeacherStore:
    rows = {"train": random_rows(24, 1, VOCABULARY), "validation": random_rows(7, 2, VOCABULARY)}
    keep = ["hidden_states", "attentions", "queries", "keys", "values"]
    return write_inside(tmp_path_factory.mktemp("inside") / "store", bert(7, 4, 24, 4), rows, keep=keep)


def arguments(folder: Path, **more) -> DistillationConfig:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1,
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 12, "logging_steps": 1,
    }  # fmt: skip
    return DistillationConfig(**{**settings, **more})


def trainer_of(folder, store, student, outer=LOGITS, inner=INNER, callbacks=None, **more):
    objective = InnerObjective(task_of(store).objective(list(outer)), inner, store.fields)
    return DistillationTrainer(
        model=student, args=arguments(folder, **more), objective=objective, train_dataset=store.select("train"),
        eval_dataset=store.select("validation"), callbacks=callbacks,
    )  # fmt: skip


def weights_of(student):
    return {name: value.detach().clone() for name, value in student.named_parameters()}


def test_accumulation_gives_the_step_of_one_large_batch(store, tmp_path):
    found = []
    for size in (12, 3):
        trainer = trainer_of(
            tmp_path, store, bert(0, 2, 16, 2), per_device_train_batch_size=size, gradient_accumulation_steps=12 // size
        )
        trainer.train()
        found.append((trainer.state.log_history[0], weights_of(trainer.model)))
    for name in ("loss", "loss_logits", "loss_hidden_states", "loss_attentions", "loss_relations"):
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=1e-5), name
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-5, atol=1e-6)


def test_the_projections_learn_and_the_saved_student_is_without_them(store, tmp_path):
    trainer = trainer_of(tmp_path, store, bert(0, 2, 16, 2), max_steps=3, optim="adamw_torch")
    before = weights_of(projections_of(trainer.model))
    assert set(before) == {f"hidden_states/{i}:{2 * i}/weight" for i in range(3)}
    trainer.train()
    after = weights_of(projections_of(trainer.model))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_loss_hidden_states", "eval_loss_relations", "eval_teacher_agreement"} <= metrics.keys()
    trainer.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / FILE).exists()
    saved, report = BertForSequenceClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values()) and projections_of(saved) is None
    for name, value in saved.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(store, tmp_path, step):
    more = {
        "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1,
        "train_sampling_strategy": "random", "per_device_train_batch_size": 8,
    }  # fmt: skip

    def trained(name, seed, callbacks=None, resume=None):
        trainer = trainer_of(tmp_path / name, store, bert(seed, 2, 16, 2, dropout=0.2), callbacks=callbacks, **more)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole", 0)
    trained("part", 0, [Interrupt(step)])
    checkpoint = tmp_path / "part" / f"checkpoint-{step}"
    assert (checkpoint / FILE).is_file()
    rest = trained("part", 1, resume=True)
    assert rest.state.global_step == whole.state.global_step == 4
    expected = weights_of(whole.model)
    assert any("distillation_projections" in name for name in expected)
    for name, value in weights_of(rest.model).items():
        assert torch.equal(value, expected[name]), name
    (checkpoint / FILE).unlink()
    with pytest.raises(ConfigError, match=r"projections.safetensors is not there"):
        trainer_of(tmp_path / "part", store, bert(1, 2, 16, 2), **more).train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_comes_back_with_its_projections(store, tmp_path):
    trainer = trainer_of(
        tmp_path, store, bert(0, 2, 16, 2), max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss_hidden_states", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    evaluated = [one["eval_loss_hidden_states"] for one in trainer.state.log_history if "eval_loss" in one]
    assert evaluated[-1] < evaluated[0], "it learns, so the first checkpoint is the 'best' here"
    assert trainer.evaluate()["eval_loss_hidden_states"] == pytest.approx(evaluated[0], rel=1e-6)


def test_a_second_stage_forgets_the_projections_of_the_first(store, tmp_path):
    student = bert(0, 2, 16, 2)
    first = trainer_of(tmp_path / "1", store, student, outer=())
    first.train()
    assert projections_of(student) is not None and "loss_hidden_states" in first.state.log_history[0]
    second = trainer_of(tmp_path / "2", store, student, inner=[Term("attentions")])
    assert projections_of(student) is None
    second.train()
    DistillationTrainer(model=student, args=arguments(tmp_path / "3"), train_dataset=store.select("train")).train()


def test_an_optimizer_made_before_the_projections_is_refused(store, tmp_path):
    student = bert(0, 2, 16, 2)
    objective = InnerObjective(task_of(store).objective([]), INNER, store.fields)
    with pytest.raises(ConfigError, match="optimizers leaves out the projections"):
        DistillationTrainer(
            model=student, args=arguments(tmp_path), objective=objective, train_dataset=store.select("train"),
            optimizers=(torch.optim.SGD(student.parameters()), None),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="model_init"):
        DistillationTrainer(
            model_init=lambda: student,
            args=arguments(tmp_path),
            objective=objective,
            train_dataset=store.select("train"),
        )


def test_activation_checkpointing_changes_nothing(store, tmp_path):
    found = []
    for on in (False, True):
        how = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = trainer_of(tmp_path, store, bert(0, 2, 16, 2), **(how if on else {}))
        trainer.train()
        found.append(weights_of(trainer.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)


def test_only_columns_of_the_map_come_in_batches(store, tmp_path):
    trainer = trainer_of(tmp_path, store, bert(0, 2, 16, 2), inner=[Term("hidden_states", options={"layers": "last"})])
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        taught = {name for name in next(iter(loader)) if name.startswith("teacher_")}
        assert taught == {"teacher_logits", "teacher_hidden_states_04"}


def test_any_dataset_with_these_columns_works(store, tmp_path):
    rows = store.select("train")

    class Listed(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return {name: value for name, value in rows[index].items() if name != "attention_mask"}

    found = []
    for dataset in (rows, Listed()):
        objective = InnerObjective(task_of(store).objective([]), INNER, store.fields)
        trainer = DistillationTrainer(
            model=bert(0, 2, 16, 2), args=arguments(tmp_path), objective=objective, train_dataset=dataset
        )
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("outer", [(), (Term("labels", weight=0.5), Term("logits", weight=0.5))])
def test_decoders_with_grouped_queries(tmp_path, outer):
    """Attention and hidden states of a language model, whose head is run apart."""
    rows = {"train": random_rows(12, 3, VOCABULARY), "validation": random_rows(5, 4, VOCABULARY)}
    store = write_inside(
        tmp_path / "store", llama(7, 4, 32, 4, 2), rows, keep=["hidden_states", "queries", "keys"], task="causal-lm"
    )
    student = llama(0, 2, 16, 4, 4)
    inner = [Term("hidden_states"), Term("attentions"), Term("attention_scores", options={"layers": "last"})]
    trainer = trainer_of(tmp_path / "out", store, student, outer=outer, inner=inner)
    batch = next(iter(trainer.get_train_dataloader()))
    counts = trainer.distillation_objective.counts(batch).tolist()
    tokens, pairs = sum(map(len, rows["train"])), sum(len(row) * (len(row) + 1) // 2 for row in rows["train"])
    assert counts[-3:] == [3 * tokens, 2 * pairs, pairs], "a causal model sees what came before"
    with torch.no_grad():
        live = student(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
    mask = batch["attention_mask"].bool()
    weights = weights_of(projections_of(student))
    expected = np.mean([
        (live[i] @ weights[f"hidden_states/{i}:{2 * i}/weight"].T - batch[f"teacher_hidden_states_0{2 * i}"])[mask]
        .square().mean().item() for i in range(3)
    ])  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss_hidden_states"] == pytest.approx(expected, rel=1e-5)
    assert {"eval_loss", "eval_perplexity", "eval_loss_attention_scores"} <= trainer.evaluate().keys()


def test_packed_documents_give_what_they_give_apart(tmp_path):
    """Rotary positions begin anew, so the teacher's tensors of a packed row are those of its documents, joined."""
    rows = {"train": [row for row in random_rows(9, 3, VOCABULARY) if len(row) > 3][:2]}
    store = write_inside(
        tmp_path / "store", llama(7, 4, 32, 4, 2), rows, keep=["hidden_states", "queries", "keys"], task="causal-lm"
    )
    student, terms = llama(0, 2, 16, 4, 2), [Term("hidden_states"), Term("attentions"), Term("attentions", "kl")]
    objective = InnerObjective(task_of(store).objective([]), terms, store.fields)
    apart = {name: torch.as_tensor(value) for name, value in store.select("train")[[0, 1]].items()}
    lengths = [len(row) for row in rows["train"]]
    joined = {
        name: torch.cat([value[at : at + 1, :length] for at, length in enumerate(lengths)], 1)
        for name, value in apart.items()
    }
    joined["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    found = []
    for batch in (apart, joined):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        objective.attach(student, inputs)
        counts = objective.counts(batch)
        found.append((counts.tolist(), objective.step(student, inputs, batch, counts).sums))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)
