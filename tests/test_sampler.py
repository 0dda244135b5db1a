"""Batches of rows: every row once, deterministic, split by rank, grouped by length, windowed where memory is short."""

from __future__ import annotations

import numpy as np
import pytest
from predistill.student_train.sampler import (
    EvaluationBatchSampler,
    TrainBatchSampler,
    memory_bytes,
    shuffle_in_windows,
    window_of,
)

LENGTHS = np.random.default_rng(3).integers(2, 200, 1003)


def flat(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("window", [None, (100, 7)])
def test_every_row_once_and_the_same_again(lengths, window):
    sampler = TrainBatchSampler(1003, 8, lengths=lengths, window=window, seed=5)
    first = list(sampler)
    assert sorted(flat(first)) == list(range(1003))
    assert first == list(sampler) == list(TrainBatchSampler(1003, 8, lengths=lengths, window=window, seed=5))
    assert len(first) == len(sampler) == 126
    assert [len(batch) for batch in first] == [8] * 125 + [3]
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(TrainBatchSampler(1003, 8, lengths=lengths, window=window, seed=6)) != first


def test_sequential_order_and_drop_last():
    assert flat(TrainBatchSampler(10, 4, order="sequential", lengths=LENGTHS)) == list(range(10))
    assert flat(TrainBatchSampler(10, 4, order="sequential", drop_last=True)) == list(range(8))


def test_grouping_by_length_saves_padding_and_starts_with_the_longest_row():
    def padded(batches):
        return sum(len(batch) * LENGTHS[batch].max() for batch in batches)

    plain, grouped = list(TrainBatchSampler(1003, 8)), list(TrainBatchSampler(1003, 8, lengths=LENGTHS))
    assert padded(grouped) < 0.75 * padded(plain)
    assert padded(grouped) < 1.1 * LENGTHS.sum()
    assert LENGTHS[grouped[0]].max() == LENGTHS.max()
    widths = [LENGTHS[batch].max() for batch in grouped[1:50]]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


@pytest.mark.parametrize("rows", [64, 67, 65])
def test_ranks_together_take_what_one_rank_with_their_batches_takes(rows):
    ranks = [
        list(TrainBatchSampler(rows, 4, lengths=LENGTHS[:rows], seed=2, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    one = list(TrainBatchSampler(rows, 8, lengths=LENGTHS[:rows], seed=2))
    assert len(ranks[0]) == len(ranks[1]) == len(one)
    for left, right, both in zip(*ranks, one, strict=True):
        assert left and right
        assert set(left) | set(right) >= set(both)
        if len(both) > 1:
            assert sorted(left + right) == sorted(both)


def test_fewer_rows_than_ranks_are_repeated_so_that_no_rank_waits():
    batches = [list(TrainBatchSampler(2, 4, rank=rank, world_size=4)) for rank in range(4)]
    assert [len(rank) for rank in batches] == [1, 1, 1, 1]
    assert {rank[0][0] for rank in batches} == {0, 1}


def test_windows_keep_a_bounded_part_of_the_rows_in_use():
    order = shuffle_in_windows(1000, 100, 10, np.random.default_rng(0))
    assert sorted(order) == list(range(1000))
    for start in range(0, 1000, 100):
        assert len(set(order[start : start + 100] // 10)) == 10
    assert len(set(order[:100] // 100)) > 4, "a window is drawn from everywhere"


def test_window_only_where_memory_is_short():
    assert window_of("auto", 1000, 10, held=1000) is None
    assert window_of("global", 10**12, 10, held=1) is None
    rows, chunk = window_of("auto", 100 * 2**30, 10**6, held=2**30) or (0, 0)
    assert 9_000 < rows < 11_000 and 500 < chunk < 700
    assert window_of("window", 1000, 10, held=500) == (5, 671088)
    assert 2**20 < memory_bytes() < 2**60


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 7, 24, 25])
def test_evaluation_is_in_source_order_over_ranks(rows, world_size):
    samplers = [EvaluationBatchSampler(rows, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    gathered = []
    for number, shares in enumerate(zip(*samplers, strict=True)):
        assert len({len(share) for share in shares}) == 1, "gathering needs equal shapes"
        real = samplers[0].real_rows(number)[0]
        gathered += flat(shares)[:real]
        assert sum(sampler.real_rows(number)[1] for sampler in samplers) == real
    assert gathered == list(range(rows))
    assert len(samplers[0]) == number + 1
