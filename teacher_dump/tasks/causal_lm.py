"""Language models: the next token at every position of a document.

B rows, S tokens, V vocabulary, N kept positions of a batch, rows in order.

labels[s] is input_ids[s] where that token is learned, else -100. Position s predicts the token at s + 1, so what is
stored of position s speaks of labels[s + 1]; a *loss position* is one whose next label is not -100.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ...store import ConfigError, DataError, FieldSpec, content_hash
from ...store.buffers import entries_of
from ...store.head import Head, hidden_before_head, logits_of, split_head
from ...store.schema import INPUT_IDS, LABEL_LOGPROBS, LABELS, MISSING_LABEL, POSITION_IDS, POSITIONS
from ..config import DumpConfig
from ..data import SourceData
from ..logits.tokens import ENTROPY, MAX_LOGPROB, TokenLogits, row_uniforms
from ..progress import say
from ..rows.documents import Documents, joined, may_lose_all, named, tokenize
from ..rows.formats import choose_format
from ..rows.packing import check_causal, check_packing, no_mask_is_meant, pack
from ..rows.texts import chunks, within
from ..teachers.teacher import Teacher
from . import Samples

_LONGEST_PACKED = 8192  # tokens of a row that is filled without having been asked for
_LOGITS_BYTES = 2**28  # of a model's own logits at one time, where its head cannot be run apart


class Positions(NamedTuple):
    """N kept positions of a batch. row: int64 [N], of the batch; place: int64 [N], of the row's tokens."""

    row: np.ndarray
    place: np.ndarray


class CausalLM:
    """What follows each token, by the teacher."""

    model_class = "AutoModelForCausalLM"
    label_names = None

    def __init__(self, config: DumpConfig, teacher: Teacher, source: SourceData):
        self.teacher, self.tokenizer, self.packing = teacher, teacher.tokenizer, config.packing
        self.format, self.notices = choose_format(config, teacher.tokenizer, source)
        self.columns = self.format.columns
        self.max_length = _max_length(config, teacher)
        self.completion = config.positions == "completion"
        self.token_logits = TokenLogits(config, teacher.vocabulary)
        self.pad_id = teacher.pad_id if 0 <= teacher.pad_id < teacher.vocabulary else 0
        self.fields = self._make_fields()
        self.settings = {
            **self.format.settings, "max_length": self.max_length, "packing": self.packing,
            "positions": config.positions, "fields": list(config.fields), "dtype": config.dtype,
            **self.token_logits.settings,
        }  # fmt: skip
        self._known: tuple[Any, Head | None] | None = None  # the model that ran last, and its head

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        self.format.check(split, start, rows)
        if self.format.learns_all:
            return
        for chunk in chunks(rows.select(self.columns)):
            numbers, start = np.arange(start, start + len(chunk)), start + len(chunk)
            written = self.format.write(chunk, named(split, numbers))
            doubtful = np.zeros(0, np.int64) if self.packing else may_lose_all(written, self.max_length)
            if len(doubtful):
                made = tokenize(self.tokenizer, written.take(doubtful), self.format.templated, self.max_length)
                made.check(named(split, numbers[doubtful]))

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table) -> Samples:
        made, done = [], 0
        for chunk in chunks(rows.select(self.columns)):
            made.append(self._documents(split, source_index[done : done + len(chunk)], chunk))
            done += len(chunk)
        found = joined(made)
        samples = self._packed(split, found, source_index) if self.packing else self._apart(found, source_index)
        return self._with_positions(samples) if self.completion else samples

    def collate(self, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
        inputs = {INPUT_IDS: samples.padded(INPUT_IDS, rows, self.pad_id)}
        if self.packing:
            return {**inputs, POSITION_IDS: samples.padded(POSITION_IDS, rows, 0)}
        return {**inputs, "attention_mask": samples.mask(rows)}

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Raises ConfigError where the model is not causal, or does not keep packed documents apart."""
        self._head(model, inputs)

    def forward(
        self, model: Any, inputs: dict[str, Any], samples: Samples, rows: np.ndarray, kept: Any = None
    ) -> dict[str, Any]:
        """What TokenLogits.keep gives of N positions, by name; kept: what keeps them in place of `token_logits`.

        Raises ConfigError where the model is not causal, or does not keep packed documents apart.
        """
        kept, head = self.token_logits if kept is None else kept, self._head(model, inputs)
        at, width = self.positions(samples, rows), inputs[INPUT_IDS].shape[1]
        targets = torch.from_numpy(self.targets(samples, rows, at))
        uniforms = torch.from_numpy(_uniforms(samples, rows, at)) if getattr(kept, "draws", None) else None
        if head is None:
            return _from_logits(model, inputs, kept, at, targets, uniforms)
        with hidden_before_head(model) as before:
            model(**inputs)
        places = torch.from_numpy(at.row * width + at.place).to(before.hidden.device)
        return dict(kept.keep(head, before.hidden.flatten(0, 1)[places], targets, uniforms))

    def outputs(self, samples: Samples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        at = self.positions(samples, rows)
        known = self.targets(samples, rows, at) != MISSING_LABEL
        row = at.row[known]
        count = np.bincount(row, minlength=len(rows))

        def mean(values: np.ndarray) -> np.ndarray:
            """float64 [B]: over a row's loss positions."""
            return np.bincount(row, weights=values[known], minlength=len(rows)) / count

        columns = {spec.name: captured[spec.name] for spec in self.fields if spec.name in captured}
        return {
            **columns,
            "teacher_confidence": mean(np.exp(captured[MAX_LOGPROB])),
            "teacher_entropy": mean(captured[ENTROPY]),
            "teacher_loss": mean(-captured[LABEL_LOGPROBS]),
        }

    def positions(self, samples: Samples, rows: np.ndarray) -> Positions:
        """The positions of these rows of which something is stored."""
        size = samples.lengths["P" if self.completion else "S"]
        row = np.repeat(np.arange(len(rows)), size[rows])
        if not self.completion:
            return Positions(row, within(size[rows]))
        starts = np.concatenate([[0], size.cumsum()])
        return Positions(row, samples.values[POSITIONS][entries_of(starts, rows)].astype(np.int64))

    def targets(self, samples: Samples, rows: np.ndarray, at: Positions) -> np.ndarray:
        """int64 [N]: the label that each position predicts, or -100."""
        labels, source = samples.values[LABELS], rows[at.row]
        last = at.place + 1 == samples.lengths["S"][source]
        following = (samples.starts[source] + at.place + 1).clip(max=len(labels) - 1)
        return np.where(last, MISSING_LABEL, labels[following]).astype(np.int64)

    def _head(self, model: Any, inputs: dict[str, Any]) -> Head | None:
        """The model's head, looked for once; None where it cannot be run apart."""
        if self._known is None or self._known[0] is not model:
            check_causal(model, inputs[INPUT_IDS].device)
            if self.packing:
                no_mask_is_meant()
                check_packing(model, inputs[INPUT_IDS].device)
            head = split_head(model, {name: value[:1, :8] for name, value in inputs.items()})
            if head is None:
                say(f"note: the head of {type(model).__name__} cannot be run apart from it: slower, in smaller batches")
            self._known = (model, head)
        return self._known[1]

    def _make_fields(self) -> list[FieldSpec]:
        symbol = "P" if self.completion else "S"
        packed = [FieldSpec(POSITION_IDS, ("S",), "int32", role="input")] if self.packing else []
        positions = [FieldSpec(POSITIONS, ("P",), "int32")] if self.completion else []
        return [
            FieldSpec(INPUT_IDS, ("S",), "int32", role="input", pad=self.pad_id),
            *packed,
            FieldSpec(LABELS, ("S",), "int32", role="label", pad=MISSING_LABEL),
            *positions,
            *self.token_logits.fields(symbol),
            *(FieldSpec(f"teacher_{one}", (), "float32", role="summary") for one in ("confidence", "entropy", "loss")),
        ]

    def _documents(self, split: str, source_index: np.ndarray, rows: pa.Table) -> Documents:
        """Raises DataError, ConfigError where a row cannot be written, or teaches nothing."""

        where = named(split, source_index)
        written = self.format.write(rows, where)
        made = tokenize(self.tokenizer, written, self.format.templated, None if self.packing else self.max_length)
        made.check(where)
        if made.ids.max() >= self.teacher.vocabulary:
            raise ConfigError(
                f"token ids below {self.teacher.vocabulary}, as many as the teacher has, expected; its tokenizer makes "
                f"{made.ids.max()}: save the teacher with the tokenizer that it was trained with"
            )
        return made

    def _apart(self, found: Documents, source_index: np.ndarray) -> Samples:
        """One document a row."""
        values = {INPUT_IDS: found.ids, LABELS: np.where(found.learned, found.ids, MISSING_LABEL).astype(np.int32)}
        hashes = np.frombuffer(found.hashes, np.uint8).reshape(-1, 16)
        return Samples({"S": found.lengths}, values, hashes, source_index, {"truncated": int(found.cut.sum())})

    def _packed(self, split: str, found: Documents, source_index: np.ndarray) -> Samples:
        """Rows of max_length tokens; those in which nothing is learned are left out, and no other needs them."""
        rows = pack(found.lengths, self.max_length)
        learned = found.learned & (rows.position_ids > 0)  # the first token of each piece is predicted by none
        useful = np.add.reduceat(learned, rows.lengths.cumsum() - rows.lengths) > 0
        if not useful.any():
            raise DataError(
                f"split {split}, rows {source_index[0]} to {source_index[-1]}: a token to learn that another comes "
                "before expected; packed, there is none: give a longer --max-length"
            )
        kept, lengths = np.repeat(useful, rows.lengths), rows.lengths[useful]
        ids = found.ids[kept]
        labels = np.where(learned[kept], ids, MISSING_LABEL).astype(np.int32)
        values = {INPUT_IDS: ids, POSITION_IDS: rows.position_ids[kept], LABELS: labels}
        each = np.split(ids.astype("<i4"), lengths.cumsum()[:-1])
        hashes = np.frombuffer(b"".join(content_hash((one.tobytes(),)) for one in each), np.uint8).reshape(-1, 16)
        return Samples({"S": lengths}, values, hashes, source_index[rows.document[useful]], view=rows.view[useful])

    def _with_positions(self, samples: Samples) -> Samples:
        """With the loss positions of each row, "P" of them."""
        lengths = samples.lengths["S"]
        row = np.repeat(np.arange(len(samples)), lengths)
        everything = Positions(row, within(lengths))
        known = self.targets(samples, np.arange(len(samples)), everything) != MISSING_LABEL
        samples.values[POSITIONS] = everything.place[known].astype(np.int32)
        samples.lengths["P"] = np.bincount(row[known], minlength=len(samples))
        return samples


def _from_logits(
    model: Any, inputs: dict[str, Any], kept: Any, at: Positions, targets: torch.Tensor, uniforms: torch.Tensor | None
) -> dict[str, Any]:
    """The same from the model's own logits [b, S, V], of few rows at a time."""
    rows, width = inputs[INPUT_IDS].shape
    size, made = 1, []  # until V is known
    start = 0
    while start < rows:
        stop = min(start + size, rows)
        logits = logits_of(model(**{name: value[start:stop] for name, value in inputs.items()}))
        part = slice(*np.searchsorted(at.row, (start, stop)).tolist())
        places = torch.from_numpy((at.row[part] - start) * width + at.place[part]).to(logits.device)
        drawn = None if uniforms is None else uniforms[part]
        made.append(kept.keep_from_logits(logits.flatten(0, 1)[places], targets[part], drawn))
        start, size = stop, max(1, _LOGITS_BYTES // (width * logits.shape[-1] * logits.element_size()))
    return {name: torch.cat([one[name] for one in made]) for name in made[0]}


def _uniforms(samples: Samples, rows: np.ndarray, at: Positions) -> np.ndarray:
    """float64 [N]: each position's own random number, by what its row says."""
    lengths = samples.lengths["S"][rows]
    numbers = [row_uniforms(samples.content_hash[row], size) for row, size in zip(rows, lengths.tolist(), strict=True)]
    return np.concatenate(numbers)[(lengths.cumsum() - lengths)[at.row] + at.place]


def _max_length(config: DumpConfig, teacher: Teacher) -> int:
    length = teacher.max_length(config.max_length)
    if length < 2:
        raise ConfigError(f"--max-length {length}: at least 2 expected, a token and the one it predicts")
    if config.packing and "position_ids" not in teacher.inputs:
        raise ConfigError(
            "--packing: a teacher that takes position ids, by which it keeps documents apart, expected; this one takes "
            "none: leave --packing away"
        )
    if config.packing and config.max_length is None and length > _LONGEST_PACKED:
        raise ConfigError(f"--packing fills rows of --max-length tokens, and the teacher takes {length}: give a length")
    return length
