"""DistillationTrainer: transformers.Trainer, with another loss and teacher outputs read from a store.

rows = TeacherStore.open("stores/sst2").select(split="train", fields=["teacher_logits"])
DistillationTrainer(model=student, args=DistillationConfig(output_dir="out"), train_dataset=rows).train()
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, IntervalStrategy

from ..store.errors import ConfigError, PredistillError
from ..store.schema import LABELS
from .collator import DataCollatorForDistillation
from .config import DistillationConfig
from .dataset import StoreDataLoader, by_length, first_row, gather_real, is_store_rows, narrowed
from .folder import STATE, last_checkpoint
from .inside.projections import attach_projections, load_projections, projections_of, save_projections
from .objective import NEVER_GIVEN, Objective, Totals, accepted_inputs
from .sampler import EvaluationBatchSampler, TrainBatchSampler, memory_bytes, window_of
from .sharded import check_plugins, check_whole, saved_whole, spare_embeddings
from .tasks import default_objective


class DistillationTrainer(Trainer):
    """Trains a student on rows of a store; everything that a Trainer does works.

    model: any nn.Module that takes (some of) input_ids, attention_mask, token_type_ids, position_ids by name and
        returns logits: a tensor, a tuple that starts with it, or something with `.logits`. It is given no labels.
    train_dataset, eval_dataset: rows of `TeacherStore.select`, of which the columns that the terms need are
        read; any other dataset that has these columns works too, through an ordinary DataLoader.
    objective: what is minimised; by default the terms of `args`, for the task of the rows' store.
    """

    args: DistillationConfig
    loss_is_scaled_for_ga = True  # compute_loss divides by what the whole accumulation window counts

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationConfig | None = None,
        *,
        objective: Objective | None = None,
        **more: Any,
    ) -> None:
        args = DistillationConfig() if args is None else args
        if not isinstance(args, DistillationConfig):
            raise ConfigError(f"args must be a DistillationConfig, not {type(args).__name__}")
        if more.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func is not used: the loss is made of terms; give an objective")
        if more.get("eval_dataset") is None and args.eval_strategy == "epoch":
            args = copy.copy(args)
            args.eval_strategy = IntervalStrategy.NO
        if more.get("data_collator") is None:
            pad = getattr(more.get("processing_class"), "pad_token_id", None)
            more["data_collator"] = DataCollatorForDistillation(0 if pad is None else pad)
        super().__init__(model=model, args=args, **more)
        self._given_objective = objective
        self._trained, self._windows, self._evaluated = Totals(), Totals(), Totals()
        self._attach()
        fsdp, deepspeed = self._plugins
        check_plugins(fsdp, deepspeed, projections=projections_of(self._student) is not None)
        spare_embeddings(fsdp, self._student)

    @property
    def _plugins(self) -> tuple[Any, Any]:
        """accelerate's, of FSDP and of DeepSpeed; None where it is not asked for."""
        state = self.accelerator.state
        return getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)

    @functools.cached_property
    def distillation_objective(self) -> Objective:
        made = self._given_objective or default_objective(
            self.args.terms, [self.train_dataset, self.eval_dataset], self._student
        )
        made.settle(self.args)
        return made

    def _attach(self) -> None:
        """What the objective adds to the student is there before the optimizer looks for parameters."""
        attach_projections(self._student, None)  # of an earlier stage
        data = self.eval_dataset if self.train_dataset is None else self.train_dataset
        if data is None or not self.distillation_objective.looks_inside:
            return
        if self.model_init is not None:
            raise ConfigError("model_init would make another student than the one that is looked at; give model")
        check_whole(self._student)
        batch = self._prepare_inputs(self.data_collator(first_row(data)))
        self.distillation_objective.attach(self._student, self._model_inputs(batch))
        if self.optimizer is not None and projections_of(self._student) is not None:
            raise ConfigError("optimizers leaves out the projections that are learnt; give optimizer_cls_and_kwargs")

    # ---- loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one optimizer step, and what each term counts in them, int64 [terms]."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = torch.zeros(len(self.distillation_objective.terms), dtype=torch.int64, device=device)
        for batch in batches:
            counts += self.distillation_objective.counts(batch).to(device)
        counts = self._over_ranks(counts)
        self._windows.add((counts > 0).long())
        return batches, counts

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """num_items_in_batch: int64 [terms], counts of the window; None: of this batch alone."""
        objective = self.distillation_objective
        counts = objective.counts(inputs) if num_items_in_batch is None else num_items_in_batch
        with self.accelerator.autocast():
            loss, sums, outputs = objective.step(model, self._model_inputs(inputs), inputs, counts)
        self._trained.add(sums / counts.clamp(min=1))
        loss = loss * self.args.world_size  # DDP averages gradients over ranks
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's value, before its weight. Raises PredistillError once it is not a number."""
        if "loss" in logs or "train_loss" in logs:
            sums, windows = self._trained.drain(), self._windows.drain()
            if sums is not None and windows is not None:
                values = (self._over_ranks(sums) / windows.clamp(min=1)).tolist()
                self._check_finite(values)
                if "loss" in logs:
                    names = (f"loss_{name}" for name in self.distillation_objective.names)
                    logs.update(zip(names, values, strict=True))
        super().log(logs, start_time)

    def _check_finite(self, values: list[float]) -> None:
        for name, value in zip(self.distillation_objective.names, values, strict=True):
            if math.isnan(value) and not self.args.fp16:  # fp16's loss scaler steps over such batches
                raise PredistillError(
                    f"the {name} term is not a number by step {self.state.global_step}: lower --learning-rate, or "
                    "look at the student's weights; checkpoints up to the last log are from before"
                )

    def _model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        accepted = self._accepted_inputs
        return {
            name: value for name, value in inputs.items()
            if (name in accepted if accepted else name not in NEVER_GIVEN and not name.startswith("teacher_"))
        }  # fmt: skip

    @functools.cached_property
    def _accepted_inputs(self) -> set[str]:
        return accepted_inputs(self._student)

    @property
    def _student(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(mean loss of this batch, logits [B, C], labels); evaluation_loop adds up all batches.

        No logits and no labels are given where the task keeps none.
        """
        inputs = self._prepare_inputs(inputs)
        rows = self._evaluation_rows(len(next(iter(inputs.values()))))
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            found = self.distillation_objective.evaluate(model, self._model_inputs(inputs), inputs, rows)
        if found.totals is not None:
            self._evaluated.add(found.totals.detach().cpu().double())
        loss = None if found.loss is None else found.loss.detach()
        if prediction_loss_only or found.logits is None:
            return loss, None, None
        labels = inputs.get(LABELS)
        return loss, found.logits.detach(), None if labels is None else labels.clone()  # its buffer is reused

    def _evaluation_rows(self, rows: int) -> int:
        """Rows of this rank's batch that are not filling."""
        loader = self.callback_handler.eval_dataloader
        return loader.evaluated[1] if isinstance(loader, StoreDataLoader) else rows

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Predictions in source order.

        The loss and each term have one denominator over all rows, whatever the batches;
        `{prefix}_teacher_agreement` is how often student and teacher predict the same. Language models keep losses
        only: raises ConfigError where compute_metrics waits for their logits.
        """
        if self.compute_metrics is not None and not self.distillation_objective.keeps_logits:
            raise ConfigError("compute_metrics would need the logits of every token, which are not kept; leave it out")
        self._evaluated.drain()
        judged = isinstance(dataloader, StoreDataLoader) and self.distillation_objective.judges_rows
        if judged:
            prediction_loss_only = False
        if self.args.world_size > 1 and isinstance(dataloader, StoreDataLoader):
            self.gather_function = functools.partial(gather_real, self.accelerator, dataloader)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = output.metrics or {}
        totals = self._evaluated.drain()
        if totals is not None:
            found = self.distillation_objective.scores(self._over_ranks(totals.to(self.args.device)).cpu())
            if judged:
                found |= self.distillation_objective.row_scores(dataloader.rows, output.predictions)  # type: ignore[attr-defined]
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics=metrics)

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Projections are saved in checkpoints (internal calls), not with the student."""
        with contextlib.nullcontext() if _internal_call else saved_whole(self._plugins[0]):
            super().save_model(output_dir, _internal_call)
        if _internal_call:
            save_projections(self._student, str(output_dir), write=self.args.should_save)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """trainer_state.json comes last, when all ranks have written theirs: a checkpoint without it is none."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """True goes on from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
            if resume_from_checkpoint is None:
                raise ConfigError(f"{self.args.output_dir} holds no checkpoint that is whole; start without it")
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_projections(self._student, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """DeepSpeed loads a student in its own way, past `_load_from_checkpoint`."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            load_projections(self._student, checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_projections(self._student, str(self.state.best_model_checkpoint))

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        if not is_store_rows(self.train_dataset):
            return super().get_train_dataloader()
        args, objective = self.args, self.distillation_objective
        rows = narrowed(self.train_dataset, objective.fields, objective.stored_fields)
        if not len(rows):
            raise ConfigError("there are no rows to train on; check the split and --where")
        grouped = args.train_sampling_strategy == "group_by_length"
        sampler = TrainBatchSampler(
            len(rows), self._train_batch_size, **(by_length(rows) if grouped else {}),
            order="sequential" if args.train_sampling_strategy == "sequential" else "random",
            window=self._window(rows), seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index, world_size=args.world_size, drop_last=args.dataloader_drop_last,
        )  # fmt: skip
        return self._loader(rows, sampler, held=args.gradient_accumulation_steps)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        known: Any = self.eval_dataset
        rows = known if eval_dataset is None else eval_dataset
        rows = known[rows] if isinstance(rows, str) else rows
        if not is_store_rows(rows):
            return super().get_eval_dataloader(eval_dataset)
        return self._evaluation_loader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        rows = is_store_rows(test_dataset)
        return self._evaluation_loader(test_dataset) if rows else super().get_test_dataloader(test_dataset)

    def _evaluation_loader(self, rows: Any) -> StoreDataLoader:
        args, objective = self.args, self.distillation_objective
        rows = narrowed(rows, objective.evaluation_fields, objective.stored_fields)
        sampler = EvaluationBatchSampler(
            len(rows), args.eval_batch_size, rank=args.process_index, world_size=args.world_size
        )
        return self._loader(rows, sampler)

    def _loader(self, rows: Any, sampler: Any, held: int = 1) -> StoreDataLoader:
        args, workers = self.args, self.args.dataloader_num_workers
        return StoreDataLoader(
            rows, sampler, self.data_collator, held=held, device=args.device, num_workers=workers,
            pin_memory=bool(workers) and args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )  # fmt: skip

    def _window(self, rows: Any) -> tuple[int, int] | None:
        """What is shuffled at once; decided by rank 0, since ranks that differ would read some rows twice."""
        held = self.args.shuffle_window or memory_bytes() // 2
        if self.args.world_size > 1:
            everywhere = torch.tensor(held if self.args.process_index == 0 else 0, device=self.args.device)
            held = int(self._over_ranks(everywhere))
        shards = len(rows.store.shards) if hasattr(rows, "store") else 1
        return window_of(self.args.shuffle, rows.nbytes, len(rows), held, shards)
