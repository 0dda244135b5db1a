"""Columns that are not asked for stay on disk: which pages of a shard the kernel holds, before and after reading.

mincore(2) tells of every page of a file whether it is in memory. Where columns lie is what pyarrow says of the shard.
A kernel reads ahead of what is asked for, past the ends of a column too: by how much, the device says, and columns that
are not read are so large that most of them is further away.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from inner_cases import bert
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter, TeacherStore
from predistill.student_train.config import DistillationConfig
from predistill.student_train.inside.objective import InnerObjective
from predistill.student_train.losses.terms import Term
from predistill.student_train.tasks import task_of
from predistill.student_train.trainer import DistillationTrainer

ROWS, TOKENS, HEADS, LAYERS = 256, 24, 8, 6
READ, OTHERS = "teacher_hidden_states_03", ("teacher_hidden_states_00", "teacher_hidden_states_06")
ATTENTIONS = "teacher_attentions_05"
COLUMNS = (READ, *OTHERS, ATTENTIONS)
WIDTH = 64  # of the column that is read: 1.6 MB
LARGEST = 32 << 20  # bytes that a device may read ahead; a store for more would be too large for a test


def read_ahead(folder: Path) -> int:
    """Bytes that the kernel reads around a page of this folder's device; 128 KB, its default, where it does not say."""
    number = folder.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for place in (device / "queue", device.resolve().parent / "queue"):
        if (place / "read_ahead_kb").exists():
            return int((place / "read_ahead_kb").read_text()) << 10
    return 128 << 10


def write(path: Path, width: int) -> Path:
    """A store of one shard. width: of the hidden states that are not read."""
    generator = np.random.default_rng(0)
    said = {"layers": LAYERS}
    heads = max(HEADS, -(-width // TOKENS))  # so that attentions are as large
    fields = [
        FieldSpec("input_ids", ("S",), "int32", role="input"), FieldSpec("labels", (), "int64", role="label"),
        FieldSpec("teacher_logits", (3,), "float32"),
        FieldSpec(OTHERS[0], ("S", width), "float32", parameters=said),
        FieldSpec(READ, ("S", WIDTH), "float32", parameters=said),
        FieldSpec(OTHERS[1], ("S", width), "float32", parameters=said),
        FieldSpec(ATTENTIONS, (heads, "S", "S"), "float32", parameters=said),
    ]  # fmt: skip
    shard, rows = ShardPlan("train", 0, 0, ROWS), np.arange(ROWS)
    with StoreWriter.begin(path, Plan("text-classification", {}, {}, fields, [shard])) as writer:
        builder = writer.open_shard(shard, ROWS, {"S": np.full(ROWS, TOKENS)})
        builder.put("input_ids", rows, generator.integers(1, 60, (ROWS, TOKENS)))
        builder.put("labels", rows, rows % 3)
        for spec in fields[2:]:
            sizes = [size if isinstance(size, int) else TOKENS for size in spec.shape]
            builder.put(spec.name, rows, generator.random((ROWS, *sizes), np.float32))
        builder.put_addresses(generator.integers(0, 256, (ROWS, 16)).astype(np.uint8))
        writer.commit(builder)
        writer.finish()
    return path


def places(shard: Path) -> dict[str, tuple[int, int]]:
    """First and last byte, in the file, of each column's values."""
    with pa.memory_map(str(shard)) as source:
        base = source.read_buffer(1).address
        batch = pa.ipc.open_file(source).get_batch(0)
        buffers = {name: batch.column(name).buffers()[-1] for name in COLUMNS}
        return {name: (one.address - base, one.address - base + one.size) for name, one in buffers.items()}


def evict(shard: Path) -> None:
    """Dirty pages are written first: the kernel drops clean ones only."""
    descriptor = os.open(shard, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident(shard: Path) -> np.ndarray:
    """bool, one a page: is it in memory? Looking at it reads nothing."""
    size = shard.stat().st_size
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    with shard.open("r+b") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_WRITE) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(held))
        failed = libc.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
        del held
    if failed:
        pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
    return (pages & 1).astype(bool)


def shares(shard: Path, columns: dict[str, tuple[int, int]], edge: int) -> dict[str, float]:
    """Of each column, how much of it is in memory, `edge` bytes at both ends left out."""
    held, found = resident(shard), {}
    for name, (begin, end) in columns.items():
        pages = held[-(-(begin + edge) // mmap.PAGESIZE) : (end - edge) // mmap.PAGESIZE]
        found[name] = float(pages.mean()) if len(pages) else math.nan
    return found


class Cold(NamedTuple):
    """A store of which no page is in memory. edge: bytes that the kernel may read past the ends of a column."""

    path: Path
    shard: Path
    columns: dict[str, tuple[int, int]]
    edge: int


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Cold:
    """Skips where no page can be put out of memory, or nobody says which are in it."""
    if not (hasattr(os, "posix_fadvise") and hasattr(ctypes.CDLL(None), "mincore")):
        pytest.skip("mincore and posix_fadvise are needed")
    folder = tmp_path_factory.mktemp("unread")
    ahead = read_ahead(folder)
    if ahead > LARGEST:
        pytest.skip(f"this device reads {ahead >> 20} MB ahead")
    edge = ahead + (1 << 20)
    path = write(folder / "store", width=-(-3 * edge // (ROWS * TOKENS * 4)))
    [shard] = (path / "shards").glob("*.arrow")
    if not resident(shard).any():
        pytest.skip("the kernel does not say here which pages it holds")
    evict(shard)
    if resident(shard).any():
        pytest.skip("this file system keeps its pages in memory whatever is asked")
    return Cold(path, shard, places(shard), edge)


@pytest.fixture
def cold(store: Cold) -> Cold:
    gc.collect()  # pages that are still mapped stay
    evict(store.shard)
    assert max(shares(store.shard, store.columns, 0).values()) == 0
    return store


def read_by_number(path: Path, names: list[str], folder: Path) -> None:
    rows = TeacherStore.open(path).select("train", fields=names)
    order = np.random.default_rng(1).permutation(ROWS)
    for batch in np.array_split(order, 16):
        assert set(names) <= set(rows[batch])


def read_batches(path: Path, names: list[str], folder: Path) -> None:
    rows = TeacherStore.open(path).select("train").with_fields(names)
    order = np.random.default_rng(1).permutation(ROWS)
    for batch in rows.batches(np.array_split(order, 16)):
        assert set(names) <= set(batch)


def train(path: Path, names: list[str], folder: Path) -> None:
    """One epoch, in random order, on the layers of `names`."""
    store = TeacherStore.open(path)
    pairs = ",".join(f"{min(at, 2)}:{int(name[-2:])}" for at, name in enumerate(names))
    terms = [Term("hidden_states", options={"layers": pairs})]
    args = DistillationConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=1,
        per_device_train_batch_size=32, report_to=[], train_sampling_strategy="random",
    )  # fmt: skip
    objective = InnerObjective(task_of(store).objective([]), terms, store.fields)
    DistillationTrainer(
        model=bert(0, 2, 16, 2), args=args, objective=objective, train_dataset=store.select("train")
    ).train()


@pytest.mark.parametrize("reading", [read_by_number, read_batches, train], ids=lambda one: one.__name__)
def test_layers_that_are_not_read_stay_on_disk(
    reading: Callable[[Path, list[str], Path], None], cold: Cold, tmp_path: Path
) -> None:
    reading(cold.path, [READ], tmp_path / "run")
    assert shares(cold.shard, cold.columns, 0)[READ] == 1.0
    others = {name: share for name, share in shares(cold.shard, cold.columns, cold.edge).items() if name != READ}
    assert others == dict.fromkeys((*OTHERS, ATTENTIONS), 0.0)


def test_the_measure_sees_what_is_read(cold: Cold, tmp_path: Path) -> None:
    """The test above would fail if every column came along."""
    read_batches(cold.path, list(COLUMNS), tmp_path)
    assert shares(cold.shard, cold.columns, 0) == dict.fromkeys(COLUMNS, 1.0)
