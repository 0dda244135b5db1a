"""Language models in the trainer: accumulation, ranks, memory, resume, adapters, evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from language_store import MISSING, random_rows, write_store
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError
from predistill.student_train.config import DistillationConfig
from predistill.student_train.trainer import DistillationTrainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 40


def llama(seed: int, layers: int = 1, vocabulary: int = VOCABULARY, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, use_cache=False, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int, dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def logits_by(model):
    @torch.no_grad()
    def logits(ids):
        return model(input_ids=torch.tensor([ids])).logits[0]

    return logits


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TeacherStore:
    """Prompts of the first third of each row have no labels, so that rows differ in what they count."""
    rows = {"train": random_rows(48, 1, prompt=True), "validation": random_rows(21, 2)}
    return write_store(tmp_path_factory.mktemp("stores") / "store", rows, logits_by(llama(7, 2)), temperatures=[2])


def arguments(folder: Path, **more) -> DistillationConfig:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1,
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 24, "logging_steps": 1,
    }  # fmt: skip
    return DistillationConfig(**{**settings, **more})


def run(folder, rows, student, **more):
    trainer = DistillationTrainer(model=student, args=arguments(folder, **more), train_dataset=rows)
    trainer.train()
    return trainer, {name: value.detach().clone() for name, value in student.named_parameters()}


def gap(left, right):
    largest = max(float(value.abs().max()) for value in right.values())
    return max(float((left[name] - right[name]).abs().max()) for name in right) / largest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_accumulation_gives_the_step_of_one_large_batch(store, tmp_path, batch, tied):
    rows, before = store.select("train"), dict(llama(0, tie_word_embeddings=tied).named_parameters())
    whole, expected = run(tmp_path, rows, llama(0, tie_word_embeddings=tied))
    pieces, found = run(
        tmp_path, rows, llama(0, tie_word_embeddings=tied), per_device_train_batch_size=batch,
        gradient_accumulation_steps=24 // batch,
    )  # fmt: skip
    steps = [{name: (values[name] - before[name]).detach() for name in before} for values in (found, expected)]
    assert gap(*steps) < 2e-6, "a step is the gradient itself: SGD, learning rate 1"
    for name in ("loss", "loss_labels", "loss_logits"):
        assert pieces.state.log_history[0][name] == pytest.approx(whole.state.log_history[0][name], rel=1e-6)
    logs = whole.state.log_history[0]
    assert logs["loss"] == pytest.approx(0.3 * logs["loss_labels"] + 0.7 * logs["loss_logits"])


def test_the_step_of_plain_fine_tuning(store, tmp_path):
    """Labels alone: what transformers' own loss gives."""
    trainer, found = run(tmp_path, store.select("train"), llama(0), alpha=0.0)
    assert "teacher_top_k_logits" not in next(iter(trainer.get_train_dataloader()))
    student = llama(0).train()
    rows = store.select("train")[list(range(24))]
    loss = student(**{name: torch.as_tensor(rows[name]) for name in ("input_ids", "attention_mask", "labels")}).loss
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    before = dict(llama(0).named_parameters())
    steps = {name: (before[name] - found[name]).detach() for name in before}
    assert gap(steps, {name: one.grad for name, one in student.named_parameters()}) < 1e-6


def test_bf16_autocast_and_activation_checkpointing(store, tmp_path):
    rows = store.select("train")
    precise, expected = run(tmp_path, rows, llama(0, layers=2))
    half, _ = run(tmp_path, rows, llama(0, layers=2), bf16=True)
    losses = [trainer.state.log_history[0]["loss"] for trainer in (half, precise)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    _, found = run(tmp_path, rows, llama(0, layers=2), activation_checkpointing=True)
    assert gap(found, expected) < 1e-6


def test_float16_and_bfloat16_students(store, tmp_path):
    expected = run(tmp_path, store.select("train"), llama(0), learning_rate=0.0)[0].state.log_history[0]["loss"]
    trainer, _ = run(tmp_path, store.select("train"), llama(0).bfloat16(), learning_rate=0.0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=0.02)


def test_a_resumed_run_equals_an_uninterrupted_one(store, tmp_path):
    more = {
        "max_steps": 6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "train_sampling_strategy": "group_by_length", "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip

    def trained(name, student, steps=6, resume=None):
        args = arguments(tmp_path / name, **{**more, "max_steps": steps})
        trainer = DistillationTrainer(model=student, args=args, train_dataset=store.select("train"))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = trained("whole", gpt2(0, dropout=0.2))
    trained("part", gpt2(0, dropout=0.2), 4)
    rest = trained("part", gpt2(1, dropout=0.2), resume=True)
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())


# ---- evaluation ----


def test_evaluation_is_exact_whatever_the_batches(store, tmp_path):
    student, found = llama(0), []
    for size in (4, 21):
        args = arguments(tmp_path, per_device_eval_batch_size=size, temperature=2.0)
        trainer = DistillationTrainer(model=student, args=args, eval_dataset=store.select("validation"))
        timed = ("runtime", "second", "time", "epoch")
        found.append({name: value for name, value in trainer.evaluate().items() if not name.endswith(timed)})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    total, count = 0.0, 0
    for ids, _ in random_rows(21, 2):
        loss = torch.nn.functional.cross_entropy(logits_by(student)(ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
        total, count = total + loss.item(), count + len(ids) - 1
    assert found[0]["eval_loss_labels"] == pytest.approx(total / count, rel=1e-6)
    assert found[0]["eval_perplexity"] == pytest.approx(np.exp(total / count), rel=1e-6)
    names = {"loss", "loss_labels", "loss_logits", "perplexity", "token_accuracy", "teacher_agreement"}
    assert found[0].keys() == {f"eval_{name}" for name in names}


def test_prediction_keeps_losses_only(store, tmp_path):
    trainer = DistillationTrainer(model=llama(0), args=arguments(tmp_path), eval_dataset=store.select("validation"))
    output = trainer.predict(store.select("validation", fields=[]))
    assert output.predictions is None and {"test_loss", "test_perplexity"} <= output.metrics.keys()
    trainer = DistillationTrainer(
        model=llama(0), args=arguments(tmp_path), eval_dataset=store.select("validation"), compute_metrics=lambda _: {}
    )
    with pytest.raises(ConfigError, match="compute_metrics would need the logits of every token"):
        trainer.evaluate()


def test_evaluation_before_and_between_steps(store, tmp_path):
    args = arguments(
        tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=1, max_steps=3, per_device_eval_batch_size=5,
        learning_rate=0.1, metric_for_best_model="eval_perplexity", greater_is_better=False, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=llama(0), args=args, train_dataset=store.select("train"), eval_dataset=store.select("validation")
    )
    trainer.train()
    scores = [entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry]
    assert len(scores) == 4 and trainer.state.best_metric == min(scores[1:]) < scores[0]


# ---- students of other makes ----


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
def test_adapters(store, tmp_path):
    peft = pytest.importorskip("peft")
    for modules, alone in (["q_proj", "v_proj"], True), (["q_proj", "lm_head"], False):
        student = peft.get_peft_model(llama(0), peft.LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM"))
        trainer, found = run(tmp_path, store.select("train"), student, max_steps=20, learning_rate=0.5)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert (trainer.distillation_objective.student._known[1] is not None) == alone
        assert torch.equal(found["base_model.model.model.embed_tokens.weight"], llama(0).model.embed_tokens.weight)


def test_rows_that_are_no_store(store, tmp_path):
    rows = store.select("train")
    names = ("input_ids", "labels", "teacher_top_k_logits", "teacher_top_k_indices", "teacher_logsumexp")
    listed = [{name: rows[at][name].tolist() for name in names} for at in range(len(rows))]
    found, _ = run(tmp_path, listed, llama(0))
    whole, _ = run(tmp_path, rows, llama(0))
    assert found.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_packed_rows_reach_an_adapter_and_a_model_that_wants_a_cache(tmp_path):
    apart = random_rows(2, 5)
    together = [(apart[0][0] + apart[1][0], [MISSING, *apart[0][0][1:], MISSING, *apart[1][0][1:]])]
    places = [[*range(len(apart[0][0])), *range(len(apart[1][0]))]]
    teacher = logits_by(llama(7, 2))
    packed = write_store(
        tmp_path / "packed", {"train": together}, lambda _: torch.cat([teacher(ids) for ids, _ in apart]),
        position_ids={"train": places},
    )  # fmt: skip
    single = write_store(tmp_path / "apart", {"train": apart}, teacher)
    expected = run(tmp_path, single.select("train"), llama(0))[0].state.log_history[0]["loss"]
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for student in (llama(0), peft.get_peft_model(llama(0), adapters)):
        trainer, _ = run(tmp_path, packed.select("train"), student, use_cache=True)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match="position_ids, which the student does not take"):
        run(tmp_path, packed.select("train"), Bigrams())


class Bigrams(nn.Module):
    """No transformer: logits of the next token from the last one alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids):
        return self.table(input_ids)


def test_any_module_that_gives_logits_learns(store, tmp_path):
    trainer, _ = run(tmp_path, store.select("train"), Bigrams(), max_steps=30, optim="adamw_torch", learning_rate=0.1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_a_compiled_student(store, tmp_path):
    plain, _ = run(tmp_path, store.select("train"), llama(0), max_steps=3, learning_rate=0.1)
    found, _ = run(
        tmp_path, store.select("train"), llama(0), max_steps=3, learning_rate=0.1, torch_compile=True,
        torch_compile_backend="eager",
    )  # fmt: skip
    for one, other in zip(plain.state.log_history[:3], found.state.log_history[:3], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_student_whose_vocabulary_grew_between_two_runs(store, tmp_path):
    student = llama(0)
    trainer = DistillationTrainer(
        model=student, args=arguments(tmp_path), train_dataset=store.select("train"),
        eval_dataset=store.select("validation"),
    )  # fmt: skip
    trainer.evaluate()
    student.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    trainer.train()
    assert student.lm_head.weight.shape[0] == VOCABULARY + 8 and student.lm_head.weight.grad is None
    assert not torch.equal(student.lm_head.weight[:VOCABULARY], llama(0).lm_head.weight)


class Largest(TorchDispatchMode):
    """The most values that a tensor had which an operation made."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        made = found if isinstance(found, list | tuple) else [found]
        self.values = max([self.values, *(one.numel() for one in made if isinstance(one, torch.Tensor))])
        return found


def test_logits_of_a_batch_never_exist(tmp_path):
    """V 30,000 at 2,000 positions are 240 MB; no tensor that is made holds a fifth of it."""
    generator, vocabulary = np.random.default_rng(0), 30_000
    rows = [(row, row) for row in generator.integers(1, vocabulary, (2, 51)).tolist()]
    table = torch.randn(vocabulary, 8, generator=torch.Generator().manual_seed(0))
    store = write_store(tmp_path / "store", {"train": rows}, lambda ids: table[ids] @ table.T)
    student, data = llama(0, vocabulary=vocabulary), store.select("train")
    trainer = DistillationTrainer(model=student, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    [batch] = trainer.get_train_dataloader()
    trainer.compute_loss(student, batch)  # looks at the head
    batch = {name: value.repeat(20, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    with Largest() as seen:
        trainer.compute_loss(student, batch).backward()
        trainer.prediction_step(student, batch, prediction_loss_only=True)
    assert 40 * 50 * vocabulary > 5 * seen.values > 0
