"""Batches of rows: every row once, deterministic, split by rank, grouped by length, windowed where memory is short."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from predistill.student_train import permutation
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
    order = np.concatenate(list(shuffle_in_windows(1000, 100, 10, np.random.default_rng(0))))
    assert sorted(order) == list(range(1000))
    for start in range(0, 1000, 100):
        assert len(set(order[start : start + 100] // 10)) == 10
    assert len(set(order[:100] // 100)) > 4, "a window is drawn from everywhere"


def test_window_only_where_memory_is_short():
    assert window_of("auto", 1000, 10, held=1000) is None
    assert window_of("global", 10**12, 10, held=1) is None
    rows, chunk = window_of("auto", 100 * 2**30, 10**6, held=2**30) or (0, 0)
    assert 9_000 < rows < 11_000 and 64 * chunk < rows < 66 * chunk
    assert window_of("window", 1000, 10, held=500) == (5, 1)
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


# ---- more rows than an array may hold ----


@pytest.fixture
def computed(monkeypatch):
    """Orders of more than 100 rows are computed, 64 places at a time."""
    monkeypatch.setattr(permutation, "STORED", 100)
    monkeypatch.setattr(permutation, "BLOCK", 64)


@pytest.mark.parametrize("count", [101, 128, 129, 1000, 1003, 4096, 4097])
def test_computed_orders_hold_every_row_once(computed, count):
    orders = [np.concatenate(list(permutation.shuffled(count, np.random.default_rng(seed)))) for seed in (0, 0, 1)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert (orders[0] == orders[1]).all() and (orders[0] != orders[2]).mean() > 0.9
    assert abs(np.corrcoef(orders[0], np.arange(count))[0, 1]) < 4 / count**0.5
    assert abs(np.corrcoef(orders[0][1:], orders[0][:-1])[0, 1]) < 4 / count**0.5


def test_in_computed_orders_every_row_may_stand_anywhere():
    """Of 12 rows under 2,400 keys: chi-squared of (place, row), 121 degrees of freedom; differences of neighbours."""
    keys = np.random.default_rng(0).integers(0, 2**64, (2400, permutation.ROUNDS), dtype=np.uint64)
    orders = np.stack([permutation.permuted(np.arange(12), 12, one) for one in keys])
    counts = np.stack([np.bincount(orders[:, place], minlength=12) for place in range(12)])
    assert ((counts - 200) ** 2 / 200).sum() < 121 + 5 * (2 * 121) ** 0.5
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % 12).ravel(), minlength=12)[1:]
    assert abs(steps / steps.mean() - 1).max() < 0.08


@pytest.mark.parametrize("window", [None, (500, 30)])
def test_samplers_of_computed_orders_keep_their_promises(computed, window):
    def batches(size=8, **more):
        return list(
            TrainBatchSampler(1003, size, window=window, lengths=lambda rows: LENGTHS[rows], longest=at, **more)
        )

    at = int(LENGTHS.argmax())
    whole = batches()
    assert sorted(flat(whole)) == list(range(1003)) and [len(batch) for batch in whole] == [8] * 125 + [3]
    assert at in whole[0]
    assert whole == list(TrainBatchSampler(1003, 8, window=window, lengths=LENGTHS)), "an array tells the same"
    assert len(batches(drop_last=True)) == 125
    for left, right, both in zip(*(batches(world_size=2, rank=rank) for rank in (0, 1)), batches(16), strict=True):
        assert {*left, *right} == {*both}


@pytest.mark.parametrize("window", [None, (10**8, 10**4)])
def test_a_billion_rows_need_neither_memory_nor_patience(window):
    start = time.process_time()
    tracemalloc.start()
    first = list(itertools.islice(TrainBatchSampler(10**9, 256, window=window), 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6 and time.process_time() - start < 5
    assert len(set(flat(first))) == 25600 and 0 <= min(flat(first)) <= max(flat(first)) < 10**9
    assert np.histogram(flat(first), 16, (0, 10**9))[0].min() > 1000


def test_a_window_has_no_more_chunks_than_shards_stay_mapped():
    window, chunk = window_of("window", 10**15, 10**9, held=10**12) or (0, 0)
    assert 1000 < window // chunk < 2100
    assert window_of("auto", 10**9, 10**6, held=10**10, shards=4096) is None
    window, chunk = window_of("auto", 10**9, 10**6, held=10**10, shards=40960) or (0, 0)
    assert window == 50_000 and window > 60 * chunk, "2,048 shards of 40,960, in chunks"
