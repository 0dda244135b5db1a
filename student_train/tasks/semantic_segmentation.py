"""A class for each pixel: the teacher's logits [C, h, w] at its own resolution, and a mask [H, W] of the image's size.

The student's logits are brought to the teacher's h x w for what it says, and to H x W for labels and metrics, by
bilinear interpolation, as transformers does. Pixels of the ignored class have no label; the teacher is learnt from all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ...store.errors import ConfigError, DataError
from ...store.images.pixels import MASK
from ...store.schema import LABELS, LOGITS, MISSING_LABEL
from ..losses.catalogue import SINGLE_LABEL
from ..losses.rows import row_loss
from ..losses.terms import Term
from ..objective import Batch, Evaluated, Objective, logits_of
from .image_classification import ImageClassification, ImageObjective, check_takes
from .text_classification import confidence, refuse_other_head


class SemanticSegmentation(ImageClassification):
    """Students that mark every pixel, as tasks/__init__.py asks for them."""

    model_class = "AutoModelForSemanticSegmentation"
    pipeline = "image-segmentation"
    averaged = {LOGITS: ""}
    usage = ('segment = pipeline("image-segmentation", model="path/to/this/folder")', 'segment("picture.png")')

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.settings = class_settings(store)
        self.compute_metrics = None  # type: ignore[assignment]

    def objective(self, terms: Sequence[Term]) -> SegmentationObjective:
        versions = self.store.identity.get("versions", {})
        return SegmentationObjective(terms, SINGLE_LABEL, self.settings["num_labels"], versions)

    def check_config(self, name: str, config: Any) -> None:
        """A head that was trained for another number of classes is refused."""
        refuse_other_head(name, config, "ForSemanticSegmentation", self.settings["num_labels"])

    def check_student(self, model: nn.Module) -> None:
        self.objective([]).check_logits(check_takes(model, self.processing))

    def learnable(self, rows: Any, objective: Objective) -> Any:
        """To train on masks only: a store that has them."""
        if not objective.fields and MASK not in rows.store.fields:
            raise ConfigError(f"{rows.store.path} has no masks to train on; give --alpha above 0")
        return rows

    def card_notes(self, config: Any) -> list[str]:
        return ["Classes: " + ", ".join(f"`{label}`" for label in config.id2label.values()) + "."]


def class_settings(store: Any) -> dict[str, Any]:
    """num_labels, id2label and label2id of a config, as the store's teacher has them."""
    if LOGITS not in store.fields:
        raise ConfigError(f"{store.path} has no {LOGITS}, but {', '.join(store.fields)}: dump --fields logits")
    count = int(store.fields[LOGITS].shape[0])
    names = store.label_names or [f"LABEL_{number}" for number in range(count)]
    return {"num_labels": count, "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)}}  # fmt: skip


class SegmentationObjective(ImageObjective):
    """What a batch of student logits [B, C, h', w'] costs, pixel by pixel."""

    keeps_logits = False

    def sums(self, logits: Tensor, batch: Batch) -> Tensor:
        """[terms], float32 or wider: each term summed over its pixels."""
        found, teacher, logits = [], batch.get(LOGITS), self.check_logits(logits)
        for term in self.terms:
            labels = batch.get(LABELS)
            if term.name == "labels":
                if labels is None:
                    loss, valid = row_loss(term, per_pixel(logits))
                else:
                    loss, valid = row_loss(term, per_pixel(resized(logits, labels.shape[1:])), None, labels.flatten(1))
            else:
                assert teacher is not None  # _mask has looked
                small = None if labels is None else nearest(labels, teacher.shape[2:]).flatten(1)
                student = per_pixel(resized(logits, teacher.shape[2:]))
                loss, valid = row_loss(term, student, per_pixel(teacher), small)
            found.append(torch.where(valid & self._mask(term, batch), loss, 0).sum() if valid.any() else loss.sum() * 0)
        return torch.stack(found) if found else logits.flatten()[:0].float()

    def check_logits(self, logits: Tensor) -> Tensor:
        """[B, C, h, w], as many classes as the teacher has. Raises DataError."""
        if logits.ndim != 4 or logits.shape[1] != self.num_labels:
            raise DataError(
                f"the student's logits have shape {list(logits.shape)}, [B, {self.num_labels}, h, w] expected: give a "
                "student that marks each pixel with the teacher's classes"
            )
        return logits

    def _mask(self, term: Term, batch: Batch) -> Tensor:
        """bool [B, H * W] or [B, h * w]: the pixels that the term speaks of."""
        labels = batch.get(LABELS)
        if term.name == "labels":
            if labels is None:
                return torch.zeros(len(next(iter(batch.values()))), 1, dtype=torch.bool)
            return (labels != MISSING_LABEL).flatten(1)
        if LOGITS not in batch:
            raise ConfigError(f"the term {term.name!r} needs {LOGITS}, which these rows do not have")
        teacher = batch[LOGITS]
        every = torch.ones_like(teacher[:, 0], dtype=torch.bool).flatten(1)
        if term.name != "pseudo_labels":
            return every
        free = every if labels is None else (nearest(labels, teacher.shape[2:]) == MISSING_LABEL).flatten(1)
        sure = confidence(per_pixel(teacher).float(), self.problem_type).squeeze(-1)
        return free & (sure >= term.options["threshold"])

    def evaluate(self, model: nn.Module, inputs: Batch, batch: Batch, rows: int) -> Evaluated:
        self.check.look(batch, training=False)
        batch = {name: value[:rows] for name, value in batch.items()}
        logits = self.check_logits(logits_of(model(**inputs)))[:rows]
        if not all(name in batch for name in self.fields):
            return Evaluated(None, None)
        sums, counts, agreed = self.sums(logits, batch), self.counts(batch), logits.new_zeros(2)
        if LOGITS in batch:
            teacher = batch[LOGITS]
            same = resized(logits, teacher.shape[2:]).argmax(1) == teacher.argmax(1)
            agreed = torch.stack([same.sum(), same.new_tensor(same.numel(), dtype=torch.int64)])
        totals = torch.cat([each.double().flatten() for each in (sums, counts, agreed, self._confusion(logits, batch))])
        return Evaluated(self.combine(sums, counts), totals)

    def _confusion(self, logits: Tensor, batch: Batch) -> Tensor:
        """int64 [C, C]: pixels by their class and the student's."""
        labels = batch.get(LABELS)
        if labels is None or not (labels != MISSING_LABEL).any():
            return torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64, device=logits.device)
        predicted = resized(logits, labels.shape[1:]).argmax(1)
        return multiclass_confusion_matrix(predicted, labels, self.num_labels, ignore_index=MISSING_LABEL)

    def scores(self, totals: Tensor) -> dict[str, float]:
        """totals: sums [terms], counts [terms], pixels that agree with the teacher, pixels compared, confusion [C²]."""
        size = 2 * len(self.terms) + 2
        found, confusion = super().scores(totals[:size]), totals[size:].reshape(self.num_labels, self.num_labels)
        return {**found, **pixel_scores(confusion)}


def pixel_scores(confusion: Tensor) -> Mapping[str, float]:
    """confusion: [C, C], pixels by their class and by the class that was given. mean_iou: of pixels in both over pixels
    in either, over the classes that occur in either. Nothing where no pixel has a class."""
    if not confusion.sum():
        return {}
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    there = either > 0
    return {"pixel_accuracy": float(both.sum() / confusion.sum()), "mean_iou": float((both / either)[there].mean())}


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] at another resolution; in float32 at least."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size=tuple(size), mode="bilinear", align_corners=False)


def nearest(labels: Tensor, size: Sequence[int]) -> Tensor:
    """int64 [B, H, W] at another resolution, each the label of the nearest pixel."""
    return F.interpolate(labels[:, None].double(), size=tuple(size), mode="nearest-exact")[:, 0].long()


def per_pixel(logits: Tensor) -> Tensor:
    """[B, C, h, w] as [B, h * w, C]."""
    return logits.flatten(2).mT
