"""What does dumping cost beyond the teacher itself, and what do its batches save?

`÷ bare`: seconds of dump() over seconds of the very same batches (recorded in a first dump) through the
bare model in inference mode, logits thrown away. Smaller is better; reach 1.10 on a CPU. `rows` is the
part from the first shard to the last commit; `whole` is all of dump(): loading rows and model, hashing the
teacher, the pilot, the index.

`÷ predict`: rows a second of the whole dump() over those of Trainer.predict with a fixed batch size, rows
in source order, as the Trainer makes batches by default. Larger is better; reach 1.5. dump() also
tokenises, encodes, checks and writes; for predict the rows are tokenised beforehand and its Trainer is
already built.

Fair: one process, one model class, the same attention implementation, dtype and threads; the works take
turns, and the median of the rounds' own ratios is reported.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from predistill.benchmarks.measure import WORK, alternate, note, options, quiet, ratio, table
from predistill.benchmarks.real import dataset, teacher
from predistill.benchmarks.teachers import MAX_LENGTH, encode, read_rows
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.dump import dump
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

BATCHES = (8, 32, 128)  # rows; 8 is the Trainer's own default


def run_dump(task: str, output: Path, split: str) -> dict[str, Any]:
    shutil.rmtree(output, ignore_errors=True)
    config = DumpConfig(teacher=str(teacher(task)), dataset=dataset(task), split=[split], max_length=MAX_LENGTH,
                        task="text-classification", output_dir=str(output))  # fmt: skip
    with quiet():
        return dump(config)


@contextmanager
def recorded(kind: type) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Collects the inputs of every forward of a model class."""
    batches: list[dict[str, torch.Tensor]] = []
    forward: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]

    def record(self: Any, *args: Any, **inputs: Any) -> Any:
        batches.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return forward(self, *args, **inputs)

    kind.forward = record  # type: ignore[attr-defined]
    try:
        yield batches
    finally:
        kind.forward = forward  # type: ignore[attr-defined]


def bare(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    with torch.inference_mode():
        for batch in batches:
            model(**batch)


def predictor(task: str, model: Any, evaluation: bool, batch_size: int) -> Callable[[], object]:
    import datasets

    tokenizer = AutoTokenizer.from_pretrained(teacher(task), model_max_length=MAX_LENGTH)
    rows = datasets.Dataset.from_list(encode(tokenizer, read_rows(task, evaluation)))
    args = TrainingArguments(tempfile.mkdtemp(), per_device_eval_batch_size=batch_size, report_to=[], disable_tqdm=True,
                             use_cpu=True)  # fmt: skip
    trainer = Trainer(model=model, args=args, data_collator=DataCollatorWithPadding(tokenizer))
    return lambda: trainer.predict(rows)


def measure(task: str, split: str, rounds: int) -> list[list[object]]:
    evaluation = split != "train"
    output = WORK / "dump"
    model = AutoModelForSequenceClassification.from_pretrained(teacher(task)).eval()
    with recorded(type(model)) as batches:
        run_dump(task, output, split)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    expected = len(read_rows(task, evaluation))
    batches = batches[pilot_batches(batches, expected) :]
    note(f"{task}: {rows} rows through the teacher for {expected} rows, {len(batches)} batches")
    reports: list[dict[str, Any]] = []
    works: dict[str, Callable[[], object]] = {"dump": lambda: reports.append(run_dump(task, output, split)),
                                              "bare": lambda: bare(model, batches)}  # fmt: skip
    for size in BATCHES:
        works[f"predict {size}"] = predictor(task, model, evaluation, size)
    with quiet():
        times = alternate(rounds, **works)
    shutil.rmtree(output)
    steady = [report["seconds"] for report in reports]
    whole, part = ratio(times["dump"], times["bare"]), ratio(steady, times["bare"])
    predicted = [ratio(times[f"predict {size}"], times["dump"]) for size in BATCHES]
    return [[f"{task} {split}", f"{expected:,}", f"{part:.2f}", f"{whole:.2f}", *(f"{one:.2f}" for one in predicted)]]


def pilot_batches(batches: list[dict[str, torch.Tensor]], expected: int) -> int:
    """How many of the first batches belong to the pilot: what is run beyond one pass over the rows."""
    extra = sum(len(batch["input_ids"]) for batch in batches) - expected
    count = 0
    while extra > 0:
        extra -= len(batches[count]["input_ids"])
        count += 1
    return count


def main() -> None:
    args = options(__doc__).parse_args()
    if args.quick:
        found = measure("sst2", "validation", 3)
    else:
        found = measure("ag_news", "test", 3) + measure("sst2", "train", 3)
    table(["data", "rows", "rows ÷ bare (1.10)", "whole ÷ bare",
           *(f"÷ predict, {size} rows" for size in BATCHES)], found)  # fmt: skip


if __name__ == "__main__":
    main()
