"""Text classification: one text or a pair; single-label, multi-label and regression heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ...store import DataError, FieldSpec, content_hash
from ...store.head import logits_of
from ...store.schema import INPUT_IDS, LABELS, TOKEN_TYPES
from ..config import DumpConfig
from ..data import SourceData, check_columns
from ..logits.classes import Classes
from ..rows.texts import check_text, chunks, flat
from ..teachers.teacher import Teacher
from . import Samples


class TextClassification:
    """C classes (or one real number) for each text."""

    model_class = "AutoModelForSequenceClassification"

    def __init__(self, config: DumpConfig, teacher: Teacher, source: SourceData):
        self.teacher, self.tokenizer = teacher, teacher.tokenizer
        self.texts = [name for name in (config.text_column, config.text_pair_column) if name]
        check_columns(source, self.texts)
        self.classes = Classes(config, teacher, source)
        self.notices, self.label_names = self.classes.notices, self.classes.names
        self.columns = [*self.texts, *([self.classes.column] if self.classes.column else [])]
        self.max_length = teacher.max_length(config.max_length)
        self.types = TOKEN_TYPES in self.tokenizer.model_input_names and TOKEN_TYPES in teacher.inputs
        self.fields = self._make_fields(config)
        self.settings = {
            "text_column": config.text_column, "text_pair_column": config.text_pair_column, **self.classes.settings,
            "max_length": self.max_length, "fields": list(config.fields), "dtype": config.dtype,
        }  # fmt: skip

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        for name in self.texts:
            check_text(split, start, rows, name)
        self.classes.check(split, start, rows)

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table) -> Samples:
        made = [self._tokenize(chunk) for chunk in chunks(rows.select(self.texts))]
        lengths, ids, types, hashes, truncated = (list(column) for column in zip(*made, strict=True))
        count = np.concatenate(lengths)
        if (count == 0).any():
            row = source_index[(count == 0).argmax()]
            raise DataError(f"split {split}, row {row}: the tokenizer makes no tokens of it; fill it or drop the row")
        values = {INPUT_IDS: np.concatenate(ids), LABELS: self.classes.of(rows, split)}
        if self.types:
            values[TOKEN_TYPES] = np.concatenate(types)
        digests = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(rows), 16)
        return Samples({"S": count}, values, digests, source_index, {"truncated": sum(truncated)})

    def collate(self, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
        return samples.inputs(rows, self.teacher.pad_id, self.tokenizer.pad_token_type_id)

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Any classifier will do."""

    def forward(self, model: Any, inputs: dict[str, Any], samples: Samples, rows: np.ndarray) -> dict[str, Any]:
        return {"logits": logits_of(model(**inputs))}

    def outputs(self, samples: Samples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        return self.classes.outputs(captured["logits"], samples.values[LABELS][rows])

    def _make_fields(self, config: DumpConfig) -> list[FieldSpec]:
        inputs = [FieldSpec(INPUT_IDS, ("S",), "int32", role="input", pad=self.teacher.pad_id)]
        if self.types:
            inputs.append(FieldSpec(TOKEN_TYPES, ("S",), "int8", role="input", pad=self.tokenizer.pad_token_type_id))
        return [*inputs, *self.classes.fields(config.dtype)]

    def _tokenize(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, bytes, int]:
        """(lengths int64 [n], ids int32 flat, token types int8 flat, 16 bytes a row, rows that were cut)."""
        texts = [rows.column(name).to_pylist() for name in self.texts]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False,
                                 return_token_type_ids=self.types)  # fmt: skip
        lengths, ids = flat(encoded[INPUT_IDS])
        _, types = flat(encoded[TOKEN_TYPES] if self.types else [], np.int8)
        whole = encoded.encodings
        cut = sum(bool(one.overflowing) for one in whole) if whole else int((lengths == self.max_length).sum())
        return lengths, ids, types, b"".join(map(content_hash, zip(*texts, strict=True))), cut
