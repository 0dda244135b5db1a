"""What does each way of keeping a language model's logits cost, and what does it lose?

First table: the teacher of language_teacher.py over tiny Shakespeare, as `predistill plan --task causal-lm` measures
it on pilot rows: bytes a token of logits, the teacher's mass on the kept ids, KL(exact ‖ reconstructed) in nats a token
at temperatures 1 and 2, where what was not kept is spread evenly over the other ids, at 2 without and with the
log-sum-exp stored at 2.

Second table: bytes a token at a vocabulary of 151,936, beside the schemes of others as formulas: 17-bit ids and float16
values (Megatron's offline logits), uint32 ids and float16 values, int32 ids and float32 values. Ours include the
log-sum-exp of all logits and the label's own log-probability (8 bytes), which those leave out: without them the mass of
the tail, and the teacher's own loss, are lost.
"""

from __future__ import annotations

from typing import Any

from predistill.benchmarks.language_teacher import teacher
from predistill.benchmarks.measure import DATA, WORK, options, quiet, table
from predistill.store import FieldSpec
from predistill.store.codecs import bytes_per_row

VOCABULARY = 151_936


def candidates() -> list[dict[str, Any]]:
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import plan

    data = DATA / "tiny_shakespeare" / "train.jsonl.gz"
    with quiet():
        found = plan(DumpConfig(teacher=str(teacher()), dataset=str(data), task="causal-lm",
                                output_dir=str(WORK / "stores" / "never-written"), budget=10**12))  # fmt: skip
    return found["candidates"]


def ours(k: int, codec: str) -> float:
    """Bytes a token of top-k columns, from the codecs' own sizes."""
    bits = {"bits": (VOCABULARY - 1).bit_length()}
    fields = [
        FieldSpec("ids", ("S", k), "int32", "bitpack", parameters=bits),
        FieldSpec("logits", ("S", k), "float16" if codec == "dense" else "float32", codec),
        *(FieldSpec(name, ("S",), "float32") for name in ("logsumexp", "label")),
    ]
    return (bytes_per_row(fields, {"S": 1000}) - bytes_per_row(fields, {"S": 0})) / 1000


def main() -> None:
    args = options(__doc__).parse_args()
    names = ("mass", "kl", "kl_at_2", "kl_at_2_with_logsumexp")
    rows = [
        [one["name"], f"{one['bytes_per_token']:.0f}", *("-" if one[name] is None else one[name] for name in names)]
        for one in candidates()
    ]
    table(["kept", "bytes a token", "mass", "KL, T 1", "KL, T 2", "KL, T 2, its log-sum-exp stored"], rows)
    sizes = [[k, ours(k, "dense"), ours(k, "uint8"), k * (17 / 8 + 2), k * (4 + 2.0), k * (4 + 4.0)]
             for k in ((8, 64) if args.quick else (8, 16, 32, 64, 128, 256))]  # fmt: skip
    table(["k", "float16", "8-bit", "17-bit ids + float16", "uint32 + float16", "int32 + float32"],
          [[row[0], *(f"{value:.0f}" for value in row[1:])] for row in sizes])  # fmt: skip


if __name__ == "__main__":
    main()
