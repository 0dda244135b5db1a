"""One file a task: how a row becomes model inputs, and what the model's outputs mean.

To add a task: write its class in a file here, with what `Task` asks for, and add its line to `TASKS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..inside.layers import INNER

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ...store import FieldSpec


class Entry(NamedTuple):
    """Where a task lives, the teacher outputs it can keep, its usual column of text, and settings that it knows and not
    every task does. of_images: its rows are images, and it knows no settings of text."""

    module: str
    name: str
    fields: tuple[str, ...]
    text_column: str | None = None
    settings: tuple[str, ...] = ()
    of_images: bool = False


LANGUAGE_MODEL_SETTINGS = (
    "top_k_logits", "top_p", "temperatures", "sampled_logits", "sample_temperature", "packing", "positions", "budget",
)  # fmt: skip
FIELDS = ("logits", *INNER)
LABEL_SETTINGS = ("label_column", "label_names", "label_order", "problem_type")
TAG_SETTINGS = ("label_column", "label_names", "label_order")
IMAGE_FIELDS = ("logits", "hidden_states", "pooled")
IMAGE_SETTINGS = ("image_column", "views", "view_transforms", "crop_scale", "view_seed", "batch_size")
TASKS = {
    "text-classification": Entry("text_classification", "TextClassification", FIELDS, "text", LABEL_SETTINGS),
    "token-classification": Entry("token_classification", "TokenClassification", FIELDS, "tokens", TAG_SETTINGS),
    "question-answering": Entry(
        "question_answering", "QuestionAnswering", FIELDS, "question", ("label_column", "doc_stride")
    ),
    "causal-lm": Entry("causal_lm", "CausalLM", FIELDS, settings=LANGUAGE_MODEL_SETTINGS),
    "image-classification": Entry(
        "image_classification", "ImageClassification", IMAGE_FIELDS, settings=(*LABEL_SETTINGS, *IMAGE_SETTINGS),
        of_images=True,
    ),
    "semantic-segmentation": Entry(
        "semantic_segmentation", "SemanticSegmentation", IMAGE_FIELDS,
        settings=("label_names", "mask_column", "ignore_index", *IMAGE_SETTINGS), of_images=True,
    ),
}  # fmt: skip
REFUSED = {
    "object-detection": "object-detection is not supported: detectors match their queries to boxes anew for each "
    "image, so that a student needs the matching as well as the logits; see image-classification and "
    "semantic-segmentation",
}


def task_class(name: str) -> Any:
    entry = TASKS[name]
    return getattr(importlib.import_module(f".{entry.module}", __name__), entry.name)


@dataclass
class Samples:
    """The rows of one shard, tokenised. n rows; S of a row is its number of tokens.

    lengths: {"S": int64 [n]}. values: what is stored as it is, by column: [n, *shape], flat [sum of S, ...], or an
    Arrow array of n rows for codecs that Arrow holds.
    content_hash: uint8 [n, 16]. source_index: int64 [n], the source row of each. view: int32 [n], which of the rows of
    one source row; None where there is one of each.
    notes: counts worth telling, such as {"truncated": 12}.
    """

    lengths: dict[str, np.ndarray]
    values: dict[str, Any]
    content_hash: np.ndarray
    source_index: np.ndarray
    notes: dict[str, int] = field(default_factory=dict)
    view: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.source_index)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [n]: where each row's tokens begin in flat values."""
        return self.lengths["S"].cumsum() - self.lengths["S"]

    def padded(self, column: str, rows: np.ndarray, pad: int) -> np.ndarray:
        """int64 [B, Smax] of a token-level column, right-padded to the longest of `rows`."""
        import numpy as np

        lengths, flat = self.lengths["S"][rows], self.values[column]
        steps = np.arange(lengths.max())
        at = (self.starts[rows][:, None] + steps).clip(max=len(flat) - 1)
        return np.where(steps < lengths[:, None], flat[at], pad).astype(np.int64)

    def inputs(self, rows: np.ndarray, pad: int, type_pad: int) -> dict[str, np.ndarray]:
        """What an encoder takes: ids, mask, and token types where there are any, int64 [B, Smax]."""
        from ...store.schema import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPES

        made = {INPUT_IDS: self.padded(INPUT_IDS, rows, pad), ATTENTION_MASK: self.mask(rows)}
        if TOKEN_TYPES in self.values:
            made[TOKEN_TYPES] = self.padded(TOKEN_TYPES, rows, type_pad)
        return made

    def mask(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B, Smax]: 1 where there is a token."""
        import numpy as np

        lengths = self.lengths["S"][rows]
        return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)


class Task(Protocol):
    """What a dump asks of a task. Built as `Task(config, teacher, source)`; raises ConfigError, DataError."""

    model_class: str  # transformers' Auto class that loads the teacher
    columns: list[str]  # source columns that are read
    settings: dict[str, Any]  # choices resolved, for the plan
    fields: list[FieldSpec]  # columns of the store, in order
    label_names: list[str] | None
    notices: list[str]  # lines worth telling before the dump starts

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        """Look at every row once, before the teacher runs. Raises DataError naming the row."""

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table, **of_view: int) -> Samples:
        """Tokenise source rows; source_index int64 [len(rows)] says which they are.

        A task that has `views`, by split how many rows each source row becomes, is given a `view` other than 0 too.
        """

    def collate(self, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Model inputs of a batch, right-padded: {"input_ids": int64 [B, Smax], "attention_mask": ..., ...}."""

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Look at the model, once, before it runs its first batch: these inputs. Raises ConfigError."""

    def forward(self, model: Any, inputs: dict[str, Any], samples: Samples, rows: np.ndarray) -> dict[str, Any]:
        """A batch through the teacher: tensors on its device, by name, such as {"logits": [B, C]}.

        Language models take one argument more, `kept`: what is done with the logits of each position, by default the
        task's own `token_logits`; the pilot gives its own to see them whole (fidelity.py).
        """

    def outputs(self, samples: Samples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        """Columns of a batch from what `forward` gave, as numpy arrays (float32, or whole numbers), by name.

        A field of shape ("*",) is a list of B arrays.
        """
