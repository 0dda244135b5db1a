"""Random orders of any number of rows, a block at a time.

Up to STORED rows numpy shuffles an array. Of more the order is computed: a Feistel network turns a row's place into its
number and back, so that the order of a billion rows is a few keys and no array of 8 GB. Numbers past the last row are
sent through the network again until they are rows (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

STORED = 1 << 22  # rows whose order is an array: 32 MB
BLOCK = 1 << 16  # rows that are computed at once: what numpy needs for it stays in the cache
ROUNDS = 8
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, half of the bits set
_SHIFT = np.uint64(32)


def shuffled(count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """0 … count - 1 in a random order, int64, a block at a time."""
    if count <= STORED:
        yield generator.permutation(count)
        return
    keys = generator.integers(0, 2**64, ROUNDS, dtype=np.uint64)
    for start in range(0, count, BLOCK):
        yield permuted(np.arange(start, min(start + BLOCK, count)), count, keys)


def permuted(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """int64 [n]: which of 0 … count - 1 stand at these places of the order that the keys, uint64, stand for."""
    bits = max(count - 1, 1).bit_length()
    low = bits // 2
    found = _network(places.astype(np.uint64), bits - low, low, keys)
    while len(past := np.flatnonzero(found >= count)):
        found[past] = _network(found[past], bits - low, low, keys)
    return found.astype(np.int64)


def _network(values: np.ndarray, high: int, low: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of high + low bits: each half in turn is changed by a hash of the other."""
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for at, key in enumerate(keys):
        if at % 2:
            right ^= _hash(left, key) & np.uint64((1 << low) - 1)
        else:
            left ^= _hash(right, key) & np.uint64((1 << high) - 1)
    return left << np.uint64(low) | right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = (values + key) * _MIX[0]
    mixed ^= mixed >> _SHIFT
    mixed *= _MIX[1]
    mixed ^= mixed >> _SHIFT
    return mixed


def pieces(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows in the same order, `size` at a time; fewer at the end."""
    held, rows = list[np.ndarray](), 0
    for block in blocks:
        held.append(block)
        rows += len(block)
        if rows >= size:
            together = np.concatenate(held)
            whole = rows // size * size
            yield from (together[start : start + size] for start in range(0, whole, size))
            held, rows = [together[whole:]], rows - whole
    if rows:
        yield np.concatenate(held)
