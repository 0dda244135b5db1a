"""What of ranks needs none to be started: the pages that one maps, checkpoints that were cut short, what is refused."""

from __future__ import annotations

import json
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from classification_store import random_rows, write_store
from inner_cases import bert, write_inside
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError
from predistill.student_train.config import DistillationConfig
from predistill.student_train.inside.projections import projections_of
from predistill.student_train.sampler import TrainBatchSampler
from predistill.student_train.sharded import check_plugins, check_whole, spare_embeddings
from predistill.student_train.train import leave_group, train
from predistill.student_train.trainer import DistillationTrainer
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer

ROWS, SHARD_ROWS, CLASSES = 32, 8, 1 << 18  # 1 MB a row: kernels map a file's pages by up to 1 MB at once


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logits = np.random.default_rng(0).normal(0, 1, (ROWS, CLASSES)).astype(np.float32)
    folder = tmp_path_factory.mktemp("wide") / "store"
    write_store(folder, {"train": random_rows(ROWS)}, {"train": logits}, None, shard_rows=SHARD_ROWS)
    return folder


def mapped(folder: Path) -> dict[str, int]:
    """By shard that this process has mapped, bytes of it that it holds in memory, as the kernel says."""
    found, name = dict[str, int](), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(maxsplit=5)[-1]
        elif line.startswith("Rss:") and name.startswith(str(folder)) and name.endswith(".arrow"):
            found[name] = found.get(name, 0) + int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_rank_holds_the_pages_of_its_own_rows(wide: Path) -> None:
    with TeacherStore.open(wide) as store:
        rows = store.select("train", fields=["teacher_logits"])
        assert not mapped(wide), "opening maps nothing"
        for batch in TrainBatchSampler(ROWS, 2, seed=1, rank=0, world_size=4):
            assert rows[batch]["teacher_logits"].shape == (2, CLASSES)
        share = sum(mapped(wide).values()) / (ROWS * CLASSES * 4)
        assert 0.25 <= share < 0.6, "a quarter of the rows, and what the kernel maps around each"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_windows_are_mapped_one_after_another(wide: Path) -> None:
    with TeacherStore.open(wide) as store:
        rows = store.select("train", fields=["teacher_logits"])
        sampler = TrainBatchSampler(ROWS, 4, window=(SHARD_ROWS, SHARD_ROWS), seed=1, rank=1, world_size=2)
        for number, batch in enumerate(sampler):
            rows[batch]
            assert len(mapped(wide)) == 1 + number, "a batch of both ranks is a window, which is a shard"


# ---- checkpoints ----


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("small")
    logits = np.random.default_rng(0).normal(0, 1, (24, 3))
    write_store(folder / "store", {"train": random_rows(24)}, {"train": logits}, None)
    BertConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=32, num_labels=3,
    ).save_pretrained(folder / "student")  # fmt: skip
    arguments = {"use_cpu": True, "per_device_train_batch_size": 6, "save_strategy": "steps", "save_steps": 1,
                 "num_train_epochs": 1}  # fmt: skip
    return {"stores": [str(folder / "store")], "student_config": str(folder / "student"), "alpha": 1.0,
            "training_arguments": arguments}  # fmt: skip


@pytest.mark.parametrize("after", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_checkpoint_that_was_cut_short_is_none(asked, tmp_path, monkeypatch, after) -> None:
    whole = {**asked, "output_dir": str(tmp_path / "whole")}
    part = {**asked, "output_dir": str(tmp_path / "part")}
    train(whole)

    def cut(self, *given, **more):
        real(self, *given, **more)
        if self.state.global_step == 3:
            raise KeyboardInterrupt

    real = getattr(Trainer, after)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, after, cut)
        train(part)
    assert (tmp_path / "part/checkpoint-3/model.safetensors").is_file()
    with pytest.raises(ConfigError, match="checkpoint-3: a checkpoint-… folder with a whole trainer_state.json"):
        train({**part, "resume_from_checkpoint": str(tmp_path / "part/checkpoint-3")})
    train({**part, "resume_from_checkpoint": "true"})
    mine, its = (load_file(tmp_path / name / "model.safetensors") for name in ("part", "whole"))
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_a_checkpoint_written_anew_is_none_until_it_is_whole(asked, tmp_path, monkeypatch) -> None:
    """A run that goes on from an earlier checkpoint is killed where it replaces a later one."""
    output = tmp_path / "out"
    train({**asked, "output_dir": str(output)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save_scaler", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train({**asked, "output_dir": str(output), "resume_from_checkpoint": str(output / "checkpoint-1")})
    assert not (output / "checkpoint-2/trainer_state.json").exists()
    (output / "checkpoint-3/trainer_state.json").write_text('{"global_step": 3')
    for path in ("checkpoint-4/trainer_state.json", "checkpoint-1/trainer_state.json"):
        (output / path).unlink()
    with pytest.raises(ConfigError, match="holds no checkpoint that is whole; start without it"):
        train({**asked, "output_dir": str(output), "resume_from_checkpoint": "true"})
    rows = TeacherStore.open(asked["stores"][0]).select("train")
    trainer = DistillationTrainer(
        model=small_bert(), args=DistillationConfig(output_dir=str(output), use_cpu=True, alpha=1.0), train_dataset=rows
    )
    with pytest.raises(ConfigError, match="holds no checkpoint that is whole"):
        trainer.train(resume_from_checkpoint=True)


# ---- what is refused, and what accelerate is told ----


def small_bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                   num_labels=3)
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"fsdp": "full_shard"}, "--fsdp is for several ranks: start torchrun"),
        ({"fsdp": "half_shard"}, "training arguments: Unknown `fsdp` option: half_shard"),
        ({"fsdp": "full_shard", "fsdp_config": "nowhere.json"}, "training arguments: .*nowhere.json"),
        ({"deepspeed": "ds.json"}, "DeepSpeed is not installed; pip install deepspeed"),
    ],
)
def test_settings_that_cannot_work_are_said_in_one_line(asked, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr("predistill.student_train.sharded.importlib.util.find_spec", lambda _: None)
    given = {**asked, "training_arguments": {**asked["training_arguments"], **arguments}}
    with pytest.raises(ConfigError, match=message) as refused:
        train({**given, "output_dir": str(tmp_path / "out")})
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def fsdp(version: int = 2, layers: list[str] | None = None) -> SimpleNamespace:
    return SimpleNamespace(fsdp_version=version, transformer_cls_names_to_wrap=layers)


def zero(stage: int, gather: bool = True) -> SimpleNamespace:
    return SimpleNamespace(zero_stage=stage, zero3_save_16bit_model=gather)


@pytest.mark.parametrize(
    "plugins, projections, message",
    [
        ((fsdp(1), None), True, "cannot be trained under ZeRO stage 3 or FSDP version 1"),
        ((None, zero(3)), True, "cannot be trained under ZeRO stage 3 or FSDP version 1"),
        ((None, zero(3, gather=False)), False, "set stage3_gather_16bit_weights_on_model_save to true"),
        ((fsdp(1), None), False, None),
        ((fsdp(2), None), True, None),
        ((None, zero(2, gather=False)), True, None),
        ((None, zero(3)), False, None),
    ],
)
def test_what_cannot_be_trained_in_parts(plugins, projections, message) -> None:
    if message is None:
        return check_plugins(*plugins, projections=projections)
    with pytest.raises(ConfigError, match=message):
        check_plugins(*plugins, projections=projections)


def test_a_loss_does_not_look_into_a_student_that_is_not_there() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="the student's layers, which this rank does not have"):
        check_whole(small_bert())
    student = small_bert()
    check_whole(student)
    next(student.parameters()).ds_id = 0  # type: ignore[attr-defined]  # as ZeRO stage 3 leaves it
    with pytest.raises(ConfigError, match="use ZeRO stage 2"):
        check_whole(student)


def test_blocks_around_the_embeddings_are_not_cut_twice() -> None:
    plugin = fsdp()
    spare_embeddings(plugin, small_bert())
    assert plugin.transformer_cls_names_to_wrap == ["BertLayer"]
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))  # fmt: skip
    for plugin, student in ((fsdp(), llama), (fsdp(1), small_bert()), (fsdp(), torch.nn.Linear(1, 1))):
        spare_embeddings(plugin, student)
        assert plugin.transformer_cls_names_to_wrap is None
    given = fsdp(layers=["BertEmbeddings"])
    spare_embeddings(given, small_bert())
    assert given.transformer_cls_names_to_wrap == ["BertEmbeddings"]


def test_projections_are_loaded_where_deepspeed_loads_the_student(tmp_path, monkeypatch) -> None:
    """It does so by itself, from files of its own, and they are not in them."""
    rows = {"train": random_rows(8)}
    store = write_inside(tmp_path / "store", bert(7, 2, 24, 2), rows, keep=["hidden_states"])
    args = DistillationConfig(
        output_dir=str(tmp_path), use_cpu=True, loss="hidden_states", alpha=1.0, save_strategy="steps", save_steps=1,
        max_steps=2, learning_rate=0.1,
    )  # fmt: skip
    student = bert(0, 2, 16, 2)
    trainer = DistillationTrainer(model=student, args=args, train_dataset=store.select("train"))
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1/projections.safetensors")
    made = projections_of(student)
    assert made is not None
    projections = dict(made.named_parameters())
    assert not any(torch.equal(projections[name], value) for name, value in saved.items())
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda *_: None)
    trainer._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-1"))
    assert saved and all(torch.equal(projections[name], value) for name, value in saved.items())


def test_a_run_says_how_many_rows_a_batch_has(asked, tmp_path) -> None:
    train({**asked, "output_dir": str(tmp_path / "out")})
    assert json.loads((tmp_path / "out/predistill.json").read_text())["batch_rows"] == 6


def test_ddp_is_gone_before_its_process_group_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its reducer is the last that holds the group, and a rank may wait for itself forever as it ends."""
    student = small_bert()
    args = DistillationConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    trainer = DistillationTrainer(model=student, args=args, train_dataset=None)
    alive: list[bool] = []
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        trainer.model_wrapped = DistributedDataParallel(student)
        trainer.accelerator._models.append(trainer.model_wrapped)
        wrapped = weakref.ref(trainer.model_wrapped)
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: alive.append(wrapped() is not None))
        leave_group(trainer)
    finally:
        monkeypatch.undo()
        torch.distributed.destroy_process_group()
    assert alive == [False]
