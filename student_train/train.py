"""Training, as a story: open stores, build the student, train, evaluate, save. No teacher is ever loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..store.errors import ConfigError, StoreMismatch
from ..store.identity import canonical, short
from .card import CARD, METRICS, PROVENANCE, model_card, provenance, write_json
from .collator import DataCollatorForDistillation
from .config import DistillationConfig
from .progress import quiet_stdout, show_progress
from .settings import DistillationSettings, TrainConfig
from .stores import evaluation_split, open_stores, select
from .students import build_student
from .tasks import Task, task_of
from .trainer import DistillationTrainer


@quiet_stdout()
def train(settings: TrainConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Train one student; returns what metrics.json holds: the Trainer's metrics, its parameters and folder.

    Raises ConfigError, DataError or a StoreError, before anything is trained, for what cannot work.
    """
    config = settings if isinstance(settings, TrainConfig) else TrainConfig(**settings)
    grouped = torch.distributed.is_initialized()
    output = Path(str(config.output_dir))
    checkpoint = prepare_folder(config, output)

    stores = open_stores(config.stores)
    task = task_of(stores[0])
    evaluated = evaluation_split(config, stores)
    args = training_arguments(config, evaluated)
    set_seed(args.seed)
    student = build_student(config, stores[0])
    objective = task.objective(config.terms(task.temperature))
    train_rows = select(config, stores, student, objective, config.train_split, config.where)
    eval_rows = select(config, stores, student, objective, evaluated) if evaluated else None

    made = provenance(config, args, stores, student, objective.terms, len(train_rows))
    if checkpoint:
        check_same_run(output, made)
    elif is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / PROVENANCE, made)

    pad = getattr(student.tokenizer, "pad_token_id", None)
    trainer = DistillationTrainer(
        model=student.model, args=args, objective=objective, train_dataset=train_rows, eval_dataset=eval_rows,
        processing_class=student.tokenizer, data_collator=DataCollatorForDistillation(pad or 0),
        compute_metrics=task.compute_metrics,
    )  # fmt: skip
    show_progress(trainer)
    metrics: dict[str, Any] = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if eval_rows is not None:
        metrics |= final_evaluation(trainer)
    metrics["student_parameters"] = sum(one.numel() for one in student.model.parameters())
    metrics["output_dir"] = str(output)
    save(trainer, task, output, made, metrics)
    for store in stores:
        store.close()
    if torch.distributed.is_initialized() and not grouped:  # gloo's threads abort a process that ends beside them
        torch.distributed.destroy_process_group()
    return metrics


# ---- the folder ----


def prepare_folder(config: TrainConfig, output: Path) -> str | None:
    """The checkpoint to go on from, if any. Raises ConfigError where the folder holds another run."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output-dir {output} is a file; give a folder that is new or empty")
    asked = str(config.resume_from_checkpoint or "false")
    if asked.lower() == "true":
        found = get_last_checkpoint(output) if output.is_dir() else None
        if found is None:
            raise ConfigError(f"--resume-from-checkpoint true: {output} holds no checkpoint; start without it")
        return found
    if asked.lower() != "false":
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ConfigError(
                f"--resume-from-checkpoint {asked}: a checkpoint-… folder with trainer_state.json expected"
            )
        return asked
    held = list(output.glob("checkpoint-*"))
    held += [output / name for name in (PROVENANCE, METRICS, "model.safetensors") if (output / name).exists()]
    if held and is_main_process():
        if not config.overwrite_output_dir:
            raise ConfigError(
                f"--output-dir {output} holds another run ({sorted(held)[0].name}): give another folder, "
                "--resume-from-checkpoint true to go on, or --overwrite-output-dir to start anew"
            )
        for path in held:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def check_same_run(output: Path, made: Mapping[str, Any]) -> None:
    """Raises StoreMismatch where a run is continued from another store, with other rows or another loss."""
    import json

    if not (output / PROVENANCE).is_file():
        return
    before = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
    for what, value in _resumed(made).items():
        stored = _resumed(before)[what]
        if canonical(stored) != canonical(value):
            had, has = _apart(stored, value)
            raise StoreMismatch(
                f"{what} differs from the run in {output}: it had {short(had)}, this one has {short(has)}: "
                "go on with the same, or start anew with --overwrite-output-dir"
            )


def _resumed(made: Mapping[str, Any]) -> dict[str, Any]:
    arguments = made.get("training_arguments", {})
    order = (
        "seed",
        "data_seed",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "train_sampling_strategy",
    )
    return {
        "store": [store["sha256"] or store["fingerprint"] for store in made["stores"]],
        "student": made["student"],
        "loss terms": made["terms"],
        "number of rows": made["rows"],
        **{name: arguments.get(name) for name in order},
    }


def _apart(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """What differs of two values that do: entries of dicts, the first entry of lists that are as long."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = [name for name in {**ours, **theirs} if canonical(ours.get(name)) != canonical(theirs.get(name))]
        return {name: ours.get(name) for name in names}, {name: theirs.get(name) for name in names}
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = zip(ours, theirs, strict=True)
        return next(_apart(*pair) for pair in pairs if canonical(pair[0]) != canonical(pair[1]))
    return ours, theirs


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


# ---- training and saving ----


def training_arguments(config: TrainConfig, evaluated: str | None) -> DistillationConfig:
    """DistillationConfig of a run. Raises ConfigError for a name or value that TrainingArguments refuses."""
    known = {one.name for one in fields(DistillationConfig)}
    for name in config.training_arguments:
        if name not in known:
            raise ConfigError(f"{name} is not a field of transformers.TrainingArguments")
    own = {one.name: getattr(config, one.name) for one in fields(DistillationSettings)}
    chosen = {"eval_strategy": "epoch" if evaluated else "no", **config.training_arguments}
    try:
        return DistillationConfig(output_dir=str(config.output_dir), **{**own, **chosen})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training arguments: {str(error).partition(chr(10))[0]}") from error


def final_evaluation(trainer: DistillationTrainer) -> dict[str, float]:
    """Metrics of the student as it is saved; those of the last epoch where nothing has changed since."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in last.items() if name.startswith("eval_")}
    return trainer.evaluate()


def save(
    trainer: DistillationTrainer, task: Task, output: Path, made: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    trainer.save_model(str(output))
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle; predistill.json says the same
    write_json(output / METRICS, metrics)
    write_json(output / PROVENANCE, made)
    notes = task.card_notes(trainer.accelerator.unwrap_model(trainer.model).config)
    model_card(made, metrics, task, notes, output.resolve().name).save(output / CARD)
