"""What does a step cost that learns from the teacher's inside, in time and in memory?

Arms, all with the same student, rows, order and batches of SST-2, float32:

    outputs   transformers.Trainer on labels alone, output_hidden_states and output_attentions switched on (eager)
    plain     the same as it is (sdpa)
    online    `outputs` with the teacher in memory, run with its outputs; MSE of hidden states and attentions
    exact     DistillationTrainer: TinyBERT's intermediate stage, hidden states and attention probabilities of a store
    queries-keys   the same from a store of queries and keys; then scores are compared, as TinyBERT's paper has it

Ratios to `outputs`; less is better. Step: forward, backward, clip and AdamW, reading included; the arms take turns of
four steps in one process, and the median over turns counts. FLOPs: of one batch forward and backward, counted by torch:
the floor that arithmetic sets for the step, projections of the student to the teacher's width among it. Tensors: the
most bytes that tensors hold at once in a step, model, optimizer and batch included, which is what a GPU's memory would
have to hold. Memory: each arm is a process of its own; on a GPU torch.cuda.max_memory_allocated, on the CPU the most
anonymous memory that the process has beyond its imports: tensors, the allocator's gaps, batches read ahead, DuckDB. The
store's mapped pages, which the kernel takes back, are not in it.

Students: `narrow` is inside_results.py's (3 blocks, 192 wide, one projection a layer); `wide` has 3 blocks of the
teacher's width, 384, and no projection.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from predistill.benchmarks.inside_results import LAYERS, STUDENT
from predistill.benchmarks.language_step import peak_memory
from predistill.benchmarks.measure import WORK, alternate, note, options, quiet, ratio, table
from predistill.benchmarks.real import teacher
from predistill.benchmarks.teachers import MAX_LENGTH, TASKS, encode, read_rows
from predistill.store import TeacherStore
from predistill.student_train.config import DistillationConfig
from predistill.student_train.trainer import DistillationTrainer
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.dump import dump
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers import BertForSequenceClassification as Bert

ROWS, BATCH, TURN = 2048, 32, 4  # rows of the stores, rows a step, steps a turn
STORES = {
    "exact float16": ("exact", "float16"), "exact int8": ("exact", "int8"),
    "queries-keys float16": ("queries-keys", "float16"), "queries-keys int8": ("queries-keys", "int8"),
}  # fmt: skip
ARMS = ("outputs", "plain", "online", *STORES)
QUICK = ("outputs", "plain", "online", "exact float16", "queries-keys float16")
WIDTHS = {"narrow": STUDENT, "wide": {**STUDENT, "hidden_size": 384, "intermediate_size": 1536}}
PAIRS = ((0, 0), (1, 2), (2, 4), (3, 6))  # uniform, of 3 blocks and 6; attention of block n is number n - 1
CUDA = torch.cuda.is_available()


def inside_store(name: str, fields: list[str], storage: str, dtype: str, rows: int = ROWS) -> Path:
    """Of the first rows of SST-2, made once."""
    folder = WORK / "stores" / f"inside-{name}-{storage}-{dtype}-{rows}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        data = WORK / "data" / f"sst2-first-{rows}.jsonl.gz"
        data.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(data, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in read_rows("sst2")[:rows])
        with quiet():
            dump(
                DumpConfig(
                    teacher=str(teacher("sst2")), dataset=str(data), max_length=MAX_LENGTH, task="text-classification",
                    output_dir=str(folder), layers=LAYERS, fields=["logits", *fields], attention_storage=storage,
                    dtype=dtype,
                )
            )  # fmt: skip
    return folder


def store(arm: str) -> Path:
    return inside_store("step", ["hidden_states", "attentions"], *STORES[arm])


def student(size: str, **more: Any) -> Bert:
    """With random weights."""
    guide = BertConfig.from_pretrained(teacher("sst2"))
    torch.manual_seed(0)
    settings = {**WIDTHS[size], **more, "vocab_size": guide.vocab_size, "num_labels": len(TASKS["sst2"][2])}
    return Bert(BertConfig(**settings))


class OnlineTrainer(Trainer):
    """TinyBERT's terms of the inside by hand, sums over layers of means over tokens and over pairs of them.

    joins: one linear map a pair of hidden states, where widths differ.
    """

    guide: Any
    joins: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            theirs = self.guide(**inputs)
        own = model(**inputs)
        mask = inputs["attention_mask"].float()
        pairs = mask[:, :, None] * mask[:, None, :]
        loss = mask.new_zeros(())
        for join, (left, right) in zip(self.joins, PAIRS, strict=True):
            gap = join(own.hidden_states[left]) - theirs.hidden_states[right]
            loss = loss + (gap.square().mean(-1) * mask).sum() / mask.sum()
        for left, right in PAIRS[1:]:
            gap = own.attentions[left - 1] - theirs.attentions[right - 1]
            loss = loss + (gap.square().mean(1) * pairs).sum() / pairs.sum()
        return loss


def trainer(arm: str, size: str, folder: str, steps: int) -> Trainer:
    shared: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 1e-4,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [], "logging_steps": 1000,
        "disable_tqdm": True, "use_cpu": not CUDA,
    }  # fmt: skip
    if arm in STORES:
        args = DistillationConfig(preset="tinybert", stage="intermediate", **shared)
        rows = TeacherStore.open(store(arm)).select(split="train")
        return DistillationTrainer(model=student(size), args=args, train_dataset=rows)
    outputs = {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "eager"}
    pupil = student(size, **({} if arm == "plain" else outputs))
    tokenizer = AutoTokenizer.from_pretrained(teacher("sst2"), model_max_length=MAX_LENGTH)
    found = datasets.Dataset.from_list(encode(tokenizer, read_rows("sst2")[:ROWS]))
    kind = OnlineTrainer if arm == "online" else Trainer
    more = {"train_dataset": found, "data_collator": DataCollatorWithPadding(tokenizer)}
    if arm == "online":  # the optimizer is to find them
        guide = AutoModelForSequenceClassification.from_pretrained(teacher("sst2"), dtype=torch.float32, **outputs)
        width, wide = pupil.config.hidden_size, guide.config.hidden_size
        maps = [torch.nn.Identity() if width == wide else torch.nn.Linear(width, wide) for _ in PAIRS]
        pupil.joins = torch.nn.ModuleList(maps)
    made = kind(model=pupil, args=TrainingArguments(**shared), **more)
    if isinstance(made, OnlineTrainer):
        made.guide, made.joins = guide.eval().to(made.args.device), pupil.get_submodule("joins")
    return made


class LiveTensors(TorchDispatchMode):
    """peak: the most bytes of storages that were alive at once, of `held` and of all that operations took and gave."""

    def __init__(self, held: Iterable[Any]) -> None:
        super().__init__()
        self.peak, self._now, self._sizes = 0, 0, dict[int, int]()
        self._see(held)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self._see((args, found))
        return found

    def _see(self, values: Any) -> None:
        for one in tree_iter(values):
            if not isinstance(one, torch.Tensor):
                continue
            storage = one.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._sizes:
                weakref.finalize(storage, self._forget, key)
            self._now += size - self._sizes.get(key, 0)
            self._sizes[key], self.peak = size, max(self.peak, self._now)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class Stepper:
    """A Trainer's optimizer steps, `TURN` a call, so that several trainers can take turns."""

    def __init__(self, made: Trainer) -> None:
        assert made.model is not None
        self.trainer, self.model = made, made.model.train()
        self.optimizer = made.create_optimizer()
        self.batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def __call__(self) -> None:
        for _ in range(TURN):
            self.gradient()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if CUDA:
            torch.cuda.synchronize()

    def gradient(self) -> None:
        [batch], counts = self.trainer.get_batch_samples(self.batches, 1, self.trainer.args.device)
        self.trainer.training_step(self.model, batch, counts)

    def tensors(self) -> int:
        """Bytes."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held = [*self.model.parameters(), *self.model.buffers(), *states]
        if isinstance(self.trainer, OnlineTrainer):
            held += self.trainer.guide.parameters()
        with LiveTensors(held) as live:
            self()
        return live.peak

    def flops(self) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        self.batches = self._endless()  # the same batch in every arm
        with FlopCounterMode(display=False) as counted:
            self.gradient()
        self.optimizer.zero_grad(set_to_none=True)
        return counted.get_total_flops()


def time_steps(
    size: str, arms: tuple[str, ...], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, int]]:
    """Seconds of each turn, the first ones left out, FLOPs of a batch, and the most bytes of tensors, by arm."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {arm: Stepper(trainer(arm, size, folder, 1)) for arm in arms}
        flops = {arm: stepper.flops() for arm, stepper in steppers.items()}
        found = alternate(rounds + 2, **steppers)
        tensors = {arm: stepper.tensors() for arm, stepper in steppers.items()}
    return {arm: times[2:] for arm, times in found.items()}, flops, tensors


def measure_memory(arm: str, size: str, steps: int) -> int:
    """Bytes, of this process."""
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        trainer(arm, size, folder, steps).train()
    return torch.cuda.max_memory_allocated() if CUDA else peak[0]


def child(arm: str, size: str, steps: int) -> int:
    note(f"memory of {size}, {arm}")
    command = [sys.executable, str(Path(__file__)), "--child", arm, size, str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(size: str, arms: tuple[str, ...], rounds: int, steps: int, times: int) -> list[list[object]]:
    memory = {arm: [child(arm, size, steps) for _ in range(times)] for arm in arms}
    note(f"steps of {size}")
    with quiet():
        seconds, flops, tensors = time_steps(size, arms, rounds)
    rows: list[list[object]] = []
    for arm in arms:
        least, base = min(memory[arm]), min(memory["outputs"])
        per_step = sorted(seconds[arm])[rounds // 2] / TURN
        rows.append([
            size, arm, f"{ratio(seconds[arm], seconds['outputs']):.2f}", f"{flops[arm] / flops['outputs']:.2f}",
            f"{tensors[arm] / tensors['outputs']:.2f}", f"{least / base:.2f}", f"{1000 * per_step:.0f}",
            f"{tensors[arm] / 1e6:.0f}", f"{least / 1e6:.0f}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--child", nargs=3, metavar=("ARM", "STUDENT", "STEPS"), help="for itself")
    args = parser.parse_args()
    if args.child:
        with quiet():
            found = measure_memory(args.child[0], args.child[1], int(args.child[2]))
        print(json.dumps(found))
        return
    for arm in STORES:
        store(arm)
    if args.quick:
        rows = report("narrow", QUICK, rounds=4, steps=5, times=1)
    else:
        rows = [row for size in WIDTHS for row in report(size, ARMS, rounds=20, steps=40, times=2)]
    table(["student", "arm", "step ÷ outputs (reach 1.10)", "FLOPs ÷ outputs", "tensors ÷ outputs (reach 1.05)",
           "memory ÷ outputs", "ms a step", "MB of tensors", "MB in all"], rows)  # fmt: skip


if __name__ == "__main__":
    main()
