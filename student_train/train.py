"""Training, as a story: open stores, build the student, train stage by stage, evaluate, save.

No teacher is ever loaded.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..store.errors import ConfigError
from .card import CARD, METRICS, PROVENANCE, model_card, provenance, write_json
from .collator import DataCollatorForDistillation
from .config import DistillationConfig
from .dataset import first_row
from .ensembles.join import Ensemble
from .ensembles.scores import judged, learn
from .folder import Start, check_same_run, given_back, prepare_folder, stage_folder
from .inside.projections import attach_projections
from .losses.presets import Stage
from .losses.terms import Term
from .objective import Objective, accepted_inputs
from .progress import quiet_stdout, say, show_progress
from .settings import DistillationSettings, TrainConfig
from .sharded import check_installed, check_ranks, check_whole, is_main_process
from .stores import evaluation_split, open_stores, select, together
from .students import Student, build_student, usual_arguments
from .tasks import Task, check_known, make_objective, task_of
from .trainer import DistillationTrainer


@dataclass(frozen=True)
class Job:
    """One stage, ready to be trained."""

    stage: Stage
    folder: Path
    args: DistillationConfig
    objective: Objective
    train_rows: Any
    eval_rows: Any


@quiet_stdout()
def train(settings: TrainConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Train one student; returns what metrics.json holds: the Trainer's metrics, its parameters and folder.

    Raises ConfigError, DataError or a StoreError, before anything is trained, for what cannot work.
    """
    config = settings if isinstance(settings, TrainConfig) else TrainConfig(**settings)
    grouped = torch.distributed.is_initialized()
    output = Path(str(config.output_dir))

    stores = open_stores(config.stores)
    task = task_of(stores[0])
    check_known(stores[0], config)
    evaluated = evaluation_split(config, stores)
    ensemble = together(config, stores, evaluated)
    if ensemble:
        stores, task = ensemble.stores, ensemble.task
    stages = config.recipe(task.temperature)
    start = prepare_folder(config, output, stages)
    arguments = [training_arguments(config, stages, number, evaluated) for number in range(len(stages))]
    set_seed(arguments[-1].seed)
    student = build_student(config, stores[0])
    settle_weights(config, ensemble, student)
    kind, parameters = type(student.model), sum(one.numel() for one in student.model.parameters())
    jobs = [prepare(config, stores, ensemble, student, *one, evaluated) for one in zip(stages, arguments, strict=True)]
    for job in jobs[start.done + 1 :]:  # the first one is looked at when its trainer is made
        look_ahead(job, student)

    made = provenance(config, stores, student, jobs) | (ensemble.told() if ensemble else {})
    if start.resumed:
        check_same_run(output, made)
    elif is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / PROVENANCE, made)
    if start.done:
        student.model = reopened(kind, jobs[start.done - 1].folder)

    with given_back(output):
        trainer, metrics, trained = train_stages(jobs, start, task, student)
    if jobs[-1].eval_rows is not None:
        metrics |= final_evaluation(trainer) | (judged(ensemble, jobs[-1].eval_rows, config) if ensemble else {})
    if len(jobs) > 1:
        metrics["stages"] = {**earlier_stages(jobs[: start.done]), **trained}
    metrics["student_parameters"] = parameters
    metrics["output_dir"] = str(output)
    save(trainer, task, output, made, metrics)
    for store in stores:
        store.close()
    if torch.distributed.is_initialized() and not grouped:
        leave_group(trainer)
    return metrics


def leave_group(trainer: DistillationTrainer) -> None:
    """End the process group, since gloo's threads abort a process that ends beside them.

    DDP goes before it: as the last that holds the group it would wait for the group's thread with Python's lock in
    hand, for which that thread may wait.
    """
    trainer.accelerator.free_memory()
    trainer.model_wrapped = trainer._student
    gc.collect()
    torch.distributed.destroy_process_group()


# ---- stages ----


def train_stages(
    jobs: Sequence[Job], start: Start, task: Task, student: Student
) -> tuple[DistillationTrainer, dict[str, Any], dict[str, dict[str, Any]]]:
    """(the last stage's trainer, its metrics, those of each stage that is trained here)."""
    kind, trained = type(student.model), dict[str, dict[str, Any]]()
    for number, job in enumerate(jobs[start.done :], start.done):
        if len(jobs) > 1:
            say(f"stage {number + 1} of {len(jobs)}, {job.stage.name}: {', '.join(job.objective.names)}")
        trainer = make_trainer(job, task, student)
        checkpoint = start.checkpoint if number == start.done else None
        metrics: dict[str, Any] = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
        trained[job.stage.name] = dict(metrics)
        if job is not jobs[-1]:
            end_stage(trainer, job, metrics)
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # which have cut it
                student.model = reopened(kind, job.folder)
    return trainer, metrics, trained


def settle_weights(config: TrainConfig, ensemble: Ensemble | None, student: Student) -> None:
    """Learn the teachers' weights, where they are to be learnt."""
    if ensemble and ensemble.learnt_on():
        asked = ensemble.task.objective([Term("logits")])
        learn(ensemble, select(config, ensemble.stores, student, asked, ensemble.split, ensemble=ensemble))


def prepare(
    config: TrainConfig, stores: Any, ensemble: Ensemble | None, student: Student, stage: Stage,
    args: DistillationConfig, evaluated: str | None,
) -> Job:  # fmt: skip
    """Everything that can be refused is refused here, before the first stage is trained."""
    objective = make_objective(stage.terms, task_of(stores[0]).objective, stores[0].fields, args.seed)
    train_rows = select(config, stores, student, objective, config.train_split, config.where, ensemble)
    eval_rows = select(config, stores, student, objective, evaluated, ensemble=ensemble) if evaluated else None
    return Job(stage, Path(str(args.output_dir)), args, objective, train_rows, eval_rows)


def look_ahead(job: Job, student: Student) -> None:
    """Does the student have the layers that this stage will ask for? Raises ConfigError."""
    if job.objective.looks_inside:
        check_whole(student.model)
    batch, accepted = collator(student)(first_row(job.train_rows)), accepted_inputs(student.model)
    job.objective.attach(student.model, {name: value for name, value in batch.items() if name in accepted})
    attach_projections(student.model, None)


def collator(student: Student) -> DataCollatorForDistillation:
    return DataCollatorForDistillation(getattr(student.tokenizer, "pad_token_id", None) or 0)


def make_trainer(job: Job, task: Task, student: Student) -> DistillationTrainer:
    trainer = DistillationTrainer(
        model=student.model, args=job.args, objective=job.objective, train_dataset=job.train_rows,
        eval_dataset=job.eval_rows, processing_class=student.tokenizer,
        data_collator=collator(student), compute_metrics=task.compute_metrics,
    )  # fmt: skip
    show_progress(trainer)
    return trainer


def end_stage(trainer: DistillationTrainer, job: Job, metrics: Mapping[str, Any]) -> None:
    """The student as it is, so that a run that is killed later goes on from here; its metrics last."""
    trainer.save_model(str(job.folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (job.folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; predistill.json says the same
        write_json(job.folder / METRICS, metrics)


def reopened(kind: Any, folder: Path) -> Any:
    """The student, of this class, as a stage has saved it."""
    return kind.from_pretrained(folder, dtype=torch.float32)


def earlier_stages(jobs: list[Job]) -> dict[str, Any]:
    return {job.stage.name: json.loads((job.folder / METRICS).read_text(encoding="utf-8")) for job in jobs}


# ---- training and saving ----


def training_arguments(
    config: TrainConfig, stages: Sequence[Stage], number: int, evaluated: str | None
) -> DistillationConfig:
    """DistillationConfig of a stage. Raises ConfigError for a name or value that TrainingArguments refuses.

    Before the last stage the head is not trained yet: such a stage is evaluated where it says so itself.
    """
    stage, folder = stages[number], stage_folder(Path(str(config.output_dir)), stages, number)
    known = {one.name for one in fields(DistillationConfig)}
    for name in {**config.training_arguments, **stage.given}:
        if name not in known or name == "output_dir":
            raise ConfigError(f"{name} is not a field of transformers.TrainingArguments")
    own = {one.name: getattr(config, one.name) for one in fields(DistillationSettings)}
    usual = {**usual_arguments(config), "eval_strategy": "epoch" if evaluated else "no"}
    chosen = {**usual, **stage.arguments, **config.training_arguments}
    if number < len(stages) - 1:
        chosen |= {"eval_strategy": "no", "load_best_model_at_end": False}
    if chosen.get("load_best_model_at_end"):  # of the checkpoints that were evaluated
        chosen.setdefault("save_strategy", chosen["eval_strategy"])
    check_installed(chosen)
    try:
        made = DistillationConfig(output_dir=str(folder), **{**own, **chosen, **stage.given})
    except (ValueError, TypeError, OSError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"training arguments: {said}") from error
    check_ranks(made)
    return made


def final_evaluation(trainer: DistillationTrainer) -> dict[str, float]:
    """Metrics of the student as it is saved; those of the last epoch where nothing has changed since."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in last.items() if name.startswith("eval_")}
    return trainer.evaluate()


def save(
    trainer: DistillationTrainer, task: Task, output: Path, made: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """By rank 0; all ranks return when everything is there."""
    trainer.save_model(str(output))
    trainer.save_state()
    if trainer.is_world_process_zero():
        describe(trainer, task, output, made, metrics)
    trainer.accelerator.wait_for_everyone()


def describe(
    trainer: DistillationTrainer, task: Task, output: Path, made: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle; predistill.json says the same
    write_json(output / METRICS, metrics)
    write_json(output / PROVENANCE, made)
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    notes, usage = task.card_notes(student.config), getattr(student, "usage", None)
    model_card(made, metrics, task, notes, output.resolve().name, usage).save(output / CARD)
