"""How near do random batches come to the speed of memory? And to that of HF datasets?

Ratios, larger is better. `÷ limit`: rows a second of `rows.batches(...)`, padded batches of 32 random
rows, over rows a second of the limit (plain.py: memory-mapped rows copied into one reused packed buffer,
unpadded). `÷ HF`: the same over a `datasets.Dataset` in torch format with the features that its documentation
has for such values (List, Array3D, Array2D); its ragged rows come unpadded.

Fair: all pages are touched once before timing; limit and store take turns within one process, forwards and
backwards, and the median of the rounds' own ratios is reported. The store pads and hands over int64 input
ids and an attention mask as well; the limit does neither. `owned` is rows[ids]: fresh arrays, no thread, timed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from predistill.benchmarks.measure import WORK, alternate, note, options, quiet, ratio, seconds, table
from predistill.benchmarks.plain import PlainRows
from predistill.benchmarks.synthetic import LAYERS, WIDTH, Synthetic
from predistill.store import TeacherRows, TeacherStore

BATCH = 32  # rows
HF_ROWS = 512  # of wide rows: HF needs minutes to build more
REACH = {"narrow": 0.5, "map": 0.85, "tokens": 0.85}


class Case(NamedTuple):
    title: str
    rows: Synthetic
    fields: tuple[str, ...]


def cases(quick: bool) -> Iterator[Case]:
    """Shards of 256 MB; one of them, then several (4 GB of pages would not be warm on a small machine)."""
    narrow = 200_000 if quick else 2_000_000
    yield Case("logits, 16 B, 1 shard", Synthetic("narrow", narrow), ("teacher_logits",))
    yield Case("logits, 16 B, 8 shards", Synthetic("narrow", narrow, 8), ("teacher_logits",))
    for shards in (1, 2) if quick else (1, 4):
        count = f"{shards} shard{'s' * (shards > 1)}"
        yield Case(f"feature map, 197 KB, {count}", Synthetic("map", 1300 * shards, shards), ("teacher_feature_map",))
        tokens = Synthetic("tokens", 1050 * shards, shards)
        yield Case(f"4 layers of tokens, 241 KB, {count}", tokens, LAYERS)
        yield Case(f"1 layer of 4, 60 KB, {count}", tokens, LAYERS[1:2])


def measure(case: Case, folder: Path, rounds: int) -> list[object]:
    made = case.rows
    name = f"{made.kind}-{made.rows}-{made.shards}"
    store = TeacherStore.open(made.write_store(folder / name))
    chosen = Synthetic(made.kind, made.rows, made.shards, case.fields)
    plain_path = folder / f"{name}-{len(case.fields)}.bin"
    plain = PlainRows(plain_path, chosen.write_plain(plain_path), BATCH)
    rows = store.select(split="train", fields=list(case.fields))
    lists = index_lists(made.rows, 4096 if made.kind == "narrow" else 256)
    check(rows, lists[0], case)
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: plain.copy(lists),
        "store": lambda: drain(rows.batches(lists)),
    }
    if plain.same_size:
        works["take"] = lambda: plain.take(lists)
    for work in works.values():
        work()  # touch every page
    times = alternate(rounds, **works)
    limit = min(
        (times[name] for name in ("take", "copy") if name in times), key=lambda found: sorted(found)[rounds // 2]
    )
    few = lists[: 32 if made.kind != "narrow" else 200]
    count, many = sum(map(len, few)), sum(map(len, lists))
    owned = min(seconds(lambda: [rows[one] for one in few]) for _ in range(3)) / count
    slow = seconds_per_row(hugging_face(rows, case), few[: 8 if made.kind != "narrow" else 200])
    fast, bare = (sorted(found)[rounds // 2] / many for found in (times["store"], limit))
    return [
        case.title,
        REACH[made.kind],
        ratio(limit, times["store"]),
        bare / owned,
        slow / fast,
        1 / fast / 1000,
    ]


def index_lists(rows: int, count: int) -> list[np.ndarray]:
    """So many batches of random rows, epoch after epoch."""
    random = np.random.default_rng(0)
    found: list[np.ndarray] = []
    while len(found) < count:
        order = random.permutation(rows)
        found += [order[at : at + BATCH] for at in range(0, rows - BATCH + 1, BATCH)]
    return found[:count]


def drain(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def check(rows: TeacherRows, ids: np.ndarray, case: Case) -> None:
    """A batch holds what was written: the first and last field of one row against the generator's values."""
    batch = rows[ids]
    shard = next(one for one in case.rows.plans() if one.start <= ids[0] < one.stop)
    local = int(ids[0]) - shard.start
    lengths = case.rows.lengths(shard).get("S")
    for rows_made, values in case.rows.values(shard):
        if rows_made.start <= local < rows_made.stop:
            for name in case.fields:
                expected = values[name][local - rows_made.start] if lengths is None else values[name][
                    lengths[rows_made.start : local].sum() :][: lengths[local]]  # fmt: skip
                found = batch[name][0] if lengths is None else batch[name][0, : lengths[local]]
                assert np.array_equal(found, expected), f"{case.title}: {name} is not what was written"
            return


def hugging_face(rows: TeacherRows, case: Case) -> Any:
    """Some of the rows as a datasets.Dataset with the features its documentation has for such values, torch format.

    float32[4] a row is a Sequence of length 4; maps are Array3D, layers of tokens Array2D of variable first size.
    """
    import datasets

    count = min(len(rows), HF_ROWS if case.rows.kind != "narrow" else 100_000)
    columns: dict[str, list[Any]] = {name: [] for name in case.fields}
    for start in range(0, count, BATCH):
        batch = rows[start : min(start + BATCH, count)]
        lengths = batch["attention_mask"].sum(1) if "attention_mask" in batch else None
        for name in case.fields:
            own = batch[name] if lengths is None else [v[:n] for v, n in zip(batch[name], lengths, strict=True)]
            columns[name] += list(own)
    kinds = {
        "narrow": lambda: datasets.List(datasets.Value("float32"), length=4),
        "map": lambda: datasets.Array3D((384, 16, 16), "float16"),
        "tokens": lambda: datasets.Array2D((None, WIDTH), "float16"),
    }
    features = datasets.Features({name: kinds[case.rows.kind]() for name in case.fields})
    return datasets.Dataset.from_dict(columns, features=features).with_format("torch")


def seconds_per_row(dataset: Any, lists: list[np.ndarray]) -> float:
    few = [(one % len(dataset)).tolist() for one in lists]

    def read() -> None:
        for one in few:
            dataset[one]

    read()
    return min(seconds(read) for _ in range(2)) / sum(map(len, few))


def main() -> None:
    parser = options(__doc__)
    args = parser.parse_args()
    found = []
    for case in cases(args.quick):
        note(case.title)
        with quiet():
            found.append(measure(case, WORK / "stores", rounds=5 if args.quick else 11))
    table(["rows", "reach", "batches ÷ limit", "owned ÷ limit", "batches ÷ HF torch", "thousand rows/s"], found)


if __name__ == "__main__":
    main()
