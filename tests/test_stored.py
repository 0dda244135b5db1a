"""Columns read as they are stored: the same values, fewer bytes, and decoded only where a loss asks for them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from inner_cases import VOCABULARY, write_inside
from predistill.student_train.collator import DataCollatorForDistillation
from predistill.student_train.dataset import ConcatRows, narrowed
from predistill.student_train.inside.stored import StoredBatch
from transformers import BertConfig, BertForSequenceClassification

COLUMNS = ["teacher_hidden_states_01", "teacher_attentions_00", "teacher_queries_01"]
ROWS = [[2 + (5 * at + step) % (VOCABULARY - 2) for step in range(2 + at % 7)] for at in range(12)]


def store(folder, dtype: str, width: int = 160):
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=16, max_position_embeddings=16)
    )  # fmt: skip
    return write_inside(folder, teacher, {"train": ROWS}, dtype=dtype)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16", "float32"])
def test_what_is_decoded_late_is_what_the_reader_decodes(tmp_path, dtype: str) -> None:
    opened = store(tmp_path / "s", dtype)
    rows = opened.select(split="train", fields=COLUMNS)
    at = [3, 11, 0, 7]
    expected = rows[at]
    got = DataCollatorForDistillation()(rows.with_fields(COLUMNS, stored=COLUMNS)[at])
    batch = StoredBatch(got, opened.fields)
    for name in COLUMNS:
        assert name in batch
        assert np.array_equal(batch[name].float().numpy(), expected[name].astype(np.float32))
    late = {"int8": 1, "bfloat16": 2}.get(dtype, 0)
    for name in COLUMNS if late else []:
        assert name not in got
        held = sum(value.nbytes for part, value in got.items() if part.startswith(f"{name}."))
        assert late * expected[name].size <= held <= (late + 1.2) * expected[name].size
    assert got["input_ids"].dtype == torch.int64


def test_rows_remember_it_in_another_process(tmp_path) -> None:
    rows = store(tmp_path / "s", "int8").select(split="train").with_fields(COLUMNS, stored=COLUMNS)
    there = pickle.loads(pickle.dumps(rows))
    assert there[[0, 1]].keys() == rows[[0, 1]].keys() and "teacher_hidden_states_01.scales" in there[[0, 1]]
    batch = next(iter(rows.batches([[2, 5]])))
    assert np.array_equal(batch["teacher_attentions_00.values"], rows[[2, 5]]["teacher_attentions_00.values"])


def test_stores_that_keep_a_column_in_different_ways_are_decoded(tmp_path) -> None:
    parts = [store(tmp_path / dtype, dtype).select(split="train", fields=COLUMNS) for dtype in ("int8", "float32")]
    both = narrowed(ConcatRows(parts), COLUMNS, COLUMNS)[[0, 12]]
    assert both["teacher_hidden_states_01"].dtype == np.float32
    alike = narrowed(ConcatRows([parts[0], parts[0]]), COLUMNS, COLUMNS)[[0, 12]]
    assert "teacher_hidden_states_01.values" in alike
