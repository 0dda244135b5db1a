"""What a store of a language model's logits takes, on paper: bytes, shards, rows, and the hours of each phase.

    .venv/bin/python benchmarks/scale_paper.py                        # 10^12 tokens
    .venv/bin/python benchmarks/scale_paper.py --tokens 1e9 --gpus 8

Bytes are those of the columns that a dump writes, by the same function as `predistill plan`. Rates are assumptions,
given as flags; docs/scale.md says which were measured.
"""

from __future__ import annotations

import argparse

from predistill.benchmarks.measure import table
from predistill.store import FieldSpec, bytes_per_row

LENGTHS = (512, 2048, 8192)
VOCABULARIES = (32_000, 151_936)
INDEX_BYTES = 60  # a row of index.duckdb and samples.parquet together, measured by scale.py
ENTRY_BYTES = 470  # a shard in plan.json (102), store.json (275) and its sidecar


def columns(vocabulary: int, kept: str) -> list[FieldSpec]:
    """Of packed rows. kept: "top 64", "top 64, int8" or "12 draws" (so many different ids a position)."""
    bits = {"bits": (vocabulary - 1).bit_length()}
    tokens = [FieldSpec(name, ("S",), "int32") for name in ("input_ids", "labels", "position_ids")]
    real = [FieldSpec(f"teacher_{name}", ("S",), "float32") for name in ("logsumexp", "label_logprobs")]
    if kept == "12 draws":
        counts = {"counts": "teacher_sample_sizes"}
        chosen = [
            FieldSpec("teacher_sample_sizes", ("S",), "uint16"),
            FieldSpec("teacher_sample_indices", ("S", "K"), "int32", "bitpack", parameters={**bits, **counts}),
            FieldSpec("teacher_sample_counts", ("S", "K"), "uint8", parameters=counts),
        ]
    else:
        codec, dtype = ("uint8", "float32") if kept.endswith("int8") else ("dense", "float16")
        chosen = [
            FieldSpec("teacher_top_k_indices", ("S", 64), "int32", "bitpack", parameters=bits),
            FieldSpec("teacher_top_k_logits", ("S", 64), dtype, codec),
        ]
    return [*tokens, *chosen, *real, *(FieldSpec(name, (), "float32") for name in "cel")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--gpus", type=int, default=256, help="of the dump")
    parser.add_argument("--parameters", type=float, default=8e9, help="of the teacher")
    parser.add_argument("--flops", type=float, default=4e14, help="a GPU reaches, of 9.9e14 on paper")
    parser.add_argument("--network", type=float, default=10e9, help="bytes a second, of all workers")
    parser.add_argument("--shard-size", type=float, default=2.5e9)
    args = parser.parse_args()
    teacher = args.tokens * 2 * args.parameters / args.flops / args.gpus / 3600
    print(f"The teacher: {teacher:,.0f} hours of {args.gpus} GPUs.\n")
    rows = []
    for vocabulary in VOCABULARIES:
        for kept in ("top 64", "top 64, int8", "12 draws"):
            for length in LENGTHS:
                count = args.tokens / length
                size = count * bytes_per_row(columns(vocabulary, kept), {"S": length, "K": 12})
                shards, index = size / args.shard_size, count * INDEX_BYTES
                rows.append([
                    f"{vocabulary:,}", kept, f"{length:,}", f"{size / args.tokens:.1f}", f"{size / 1e12:,.1f}",
                    f"{count / 1e6:,.0f}", f"{shards:,.0f}", f"{shards * ENTRY_BYTES / 1e6:,.0f}",
                    f"{index / 1e9:,.0f}", f"{size / args.network / 3600:,.1f}",
                    f"{size / teacher / 3600 / args.gpus / 1e6:,.1f}",
                ])  # fmt: skip
    table(
        ["V", "kept", "tokens a row", "bytes a token", "TB", "million rows", "shards", "MB of JSON", "GB of index",
         "hours on the network", "MB/s a GPU"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
