"""What tests/test_train_ranks.py starts under torchrun: all its runs, one after another, in one process group.

rank_script.py FOLDER: what `runs` gives, each with FSDP as on GPUs where it asks for it; then a run whose rank 1 is
killed while a checkpoint is written. torchrun starts all again (--max-restarts 1), and that run goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED_AT = 4  # steps


def runs(folder: Path, batch: int) -> dict[str, dict[str, Any]]:
    """Settings of `train` by name. batch: rows a rank; one rank with twice as many takes the same steps."""
    always = {
        "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "gradient_accumulation_steps": 2,
        "num_train_epochs": 2, "learning_rate": 1e-2, "use_cpu": True, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 2, "optim": "adamw_torch", "disable_tqdm": True,
    }  # fmt: skip
    fsdp = {"fsdp": "full_shard", "fsdp_config": {}}

    def run(name: str, store: str, student: str, more: dict[str, Any] | None = None, **own: Any) -> dict[str, Any]:
        return {
            "stores": [str(folder / store)], "student_config": str(folder / student), "output_dir": str(folder / name),
            "training_arguments": {**always, **(more or {})}, **own,
        }  # fmt: skip

    inside = {
        "inside": {"loss": "hidden_states attentions:weight=10", "alpha": 1.0},
        "answers": {"loss": "kl", "alpha": 0.5},
    }
    return {
        "ddp": run("ddp", "rows", "still"),
        "ddp, inside": run("ddp-1", "inside", "still", alpha=0.5,
                           loss="kl hidden_states attentions:weight=10 hidden_states/pkd"),
        "ddp, tied": run("ddp-2", "texts", "decoder", {"ddp_find_unused_parameters": False}),
        "ddp, untied": run("ddp-3", "texts", "untied"),
        "whole": run("whole", "rows", "dropping"),
        "fsdp": run("fsdp", "inside", "still", fsdp, stages=inside),
        "fsdp, resumed": run("fsdp-1", "inside", "still", fsdp, stages={"inside": inside["inside"]}),
        "fsdp, in parts": run("fsdp-2", "texts", "decoder", {**fsdp, "fsdp_config": {
            "state_dict_type": "SHARDED_STATE_DICT"}}),
    }  # fmt: skip


def main(folder: Path) -> None:
    import torch
    from predistill.student_train.train import train

    torch.set_num_threads(1)
    rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    join(rank, attempt)
    asked = runs(folder, 4)
    note_rows(lambda: folder / f"rows-{attempt}-{rank}.jsonl")
    part = {**asked["whole"], "output_dir": str(folder / "part")}
    if attempt == "1":
        half = sorted(path.name for path in (folder / "part" / f"checkpoint-{KILLED_AT}").iterdir())
        (folder / f"half-{rank}.json").write_text(json.dumps(half))
        train({**part, "resume_from_checkpoint": "true"})
        return
    train(asked["ddp"])
    predict(folder, rank)
    note_rows(lambda: folder / "others.jsonl")
    for name in ("ddp, inside", "ddp, tied", "ddp, untied"):
        train(asked[name])
    note_rows(lambda: folder / f"rows-whole-{rank}.jsonl")
    train(asked["whole"])
    note_rows(lambda: folder / "others.jsonl")
    cut_on_a_cpu()
    for name in ("fsdp", "fsdp, resumed", "fsdp, in parts"):
        train(asked[name])
    again = asked["fsdp, resumed"]
    train({**again, "resume_from_checkpoint": f"{again['output_dir']}/checkpoint-2"})
    note_rows(lambda: folder / f"rows-{attempt}-{rank}.jsonl")
    killed_while_saving(rank)
    train(part)


def join(rank: int, attempt: str) -> None:
    """Under keys of this attempt: under the same, gloo may find the addresses of ranks that died (torch 2.13)."""
    from torch.distributed import PrefixStore, TCPStore, init_process_group

    everyones = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    init_process_group("gloo", store=PrefixStore(attempt, everyones), rank=rank, world_size=2)


def predict(folder: Path, rank: int) -> None:
    """Logits of the validation rows, gathered from ranks of two rows a batch."""
    from predistill import DistillationConfig, DistillationTrainer, TeacherStore
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "ddp")
    args = DistillationConfig(output_dir=str(folder / "unused"), use_cpu=True, per_device_eval_batch_size=2)
    rows: Any = TeacherStore.open(folder / "rows").select("validation")
    found: Any = DistillationTrainer(model=model, args=args, eval_dataset=rows).predict(rows).predictions
    (folder / f"predicted-{rank}.json").write_text(json.dumps(found.tolist()))


def note_rows(into: Callable[[], Path]) -> None:
    """The rows of every batch of training that a rank takes, from the outside: two tokens name a row."""
    from predistill.student_train.collator import DataCollatorForDistillation

    real = getattr(DataCollatorForDistillation, "real", DataCollatorForDistillation.__call__)

    def noting(self: Any, rows: Any) -> Any:
        made = real(self, rows)
        names = made["input_ids"][:, :2].tolist()
        if names[0][0] < 50:  # not of validation
            with open(into(), "a") as file:
                file.write(json.dumps(names) + "\n")
        return made

    DataCollatorForDistillation.real, DataCollatorForDistillation.__call__ = real, noting  # type: ignore


def cut_on_a_cpu() -> None:
    """accelerate trains by DDP where FSDP is asked for and there are CPUs only; here it is told of GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer

    real = Trainer.create_accelerator_and_postprocess

    def told(self: Any) -> None:
        known = PartialState._shared_state
        if self.args.fsdp and known["distributed_type"] is DistributedType.MULTI_CPU:
            known["distributed_type"] = DistributedType.MULTI_GPU
        real(self)
        assert not self.args.fsdp or self.accelerator.is_fsdp2

    Trainer.create_accelerator_and_postprocess = told  # type: ignore[method-assign]


def killed_while_saving(rank: int) -> None:
    from transformers import Trainer

    real = Trainer._save_rng_state

    def dying(self: Any, output_dir: str) -> None:
        if rank == 1 and self.state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, output_dir)

    Trainer._save_rng_state = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    import torch

    torch.distributed.destroy_process_group()  # a process that ends beside gloo's threads may hang, or abort
