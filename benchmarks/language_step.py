"""What does a language model's training step from the store cost, in time and in memory?

Arms, each a process of its own, the same student, rows, order and batch in all, float32 on the CPU:

    plain    transformers.Trainer, labels alone: [tokens, vocabulary] logits and their gradient exist
    top-k    DistillationTrainer from a store of the top 64 logits (labels and KL, one fused loss over chunks)
    dense    DistillationTrainer from a store of all logits, float16
    online   Trainer with the teacher in memory, run on each batch, labels and KL

The student is a Llama of 4 layers, 256 wide; the teacher of 8 layers, 512 wide; the vocabulary has 32,000 entries, a
batch 8 rows of 256 tokens. Weights are random: neither time nor memory depends on them. Time: a step is timed from the
end of the step before, of each step the fastest round counts. Memory: the largest anonymous memory of the
process while it trains, less what it had when the model stood there, every 2 ms. Ratios to plain; less is better.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predistill.benchmarks.measure import WORK, note, options, quiet, table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

ARMS = ("plain", "top-k", "dense", "online")
VOCABULARY, LENGTH, ROWS, BATCH, WARM = 32_000, 256, 64, 8, 3
ALPHA = 0.5


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class OnlineTrainer(Trainer):
    """KL to a teacher beside the student, and the labels: the formula of the fused loss, over whole logits."""

    guide: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:].flatten()
        student = model(**inputs).logits[:, :-1].flatten(0, 1).float()
        with torch.no_grad():
            teacher = self.guide(**inputs).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(student.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
        return ALPHA * kl + (1 - ALPHA) * torch.nn.functional.cross_entropy(student, labels)


def llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, intermediate_size=3 * width, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    ))  # fmt: skip


def texts() -> list[str]:
    """Rows of LENGTH words, so that every row has as many tokens."""
    words = np.random.default_rng(0).integers(2, VOCABULARY, (ROWS, LENGTH))
    return [" ".join(f"w{word}" for word in row) for row in words]


def teacher() -> Path:
    folder = WORK / "teachers" / "random-llama"
    if not (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {"<pad>": 0, "<end>": 1, **{f"w{at}": at for at in range(2, VOCABULARY)}}
        made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        llama(512, 8).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return folder


def store(kind: str) -> Path:
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / f"random-llama-{kind}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        data = WORK / "data" / "random-words.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
        with quiet():
            dump(DumpConfig(teacher=str(teacher()), dataset=str(data), task="causal-lm", output_dir=str(folder),
                            max_length=LENGTH, top_k_logits=64 if kind == "top-k" else 0))  # fmt: skip
    return folder


def trainer(arm: str, folder: str, steps: int) -> Trainer:
    shared: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 1e-4,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [], "logging_steps": 1000,
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    if arm in ("top-k", "dense"):
        from predistill.store import TeacherStore
        from predistill.student_train.config import DistillationConfig
        from predistill.student_train.trainer import DistillationTrainer

        rows = TeacherStore.open(store(arm)).select(split="train")
        return DistillationTrainer(model=llama(256, 4), train_dataset=rows,
                                   args=DistillationConfig(alpha=ALPHA, temperature=1.0, **shared))  # fmt: skip
    import datasets

    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher())
    ids = [one[:LENGTH] for one in tokenizer(texts())["input_ids"]]
    rows = datasets.Dataset.from_list([{"input_ids": one, "labels": one} for one in ids])
    kind = Trainer if arm == "plain" else OnlineTrainer
    made = kind(model=llama(256, 4), args=Arguments(**shared), train_dataset=rows)
    if isinstance(made, OnlineTrainer):
        made.guide = LlamaForCausalLM.from_pretrained(teacher()).eval()
    return made


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yields a list that holds, afterwards, the most anonymous bytes beyond those at the start."""
    found, stop, start = [0], threading.Event(), anonymous()

    def watch() -> None:
        while not stop.wait(0.002):
            found[0] = max(found[0], anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line `RssAnon:`; Linux is needed")


def run(arm: str, steps: int) -> dict[str, Any]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(arm, folder, steps)
        made.add_callback(clock)
        with peak_memory() as peak:
            made.train()
    return {"seconds": np.diff(clock.ends)[WARM:].tolist(), "memory": peak[0]}


def child(arm: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--child", arm, str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--child", nargs=2, metavar=("ARM", "STEPS"), help="for itself")
    args = parser.parse_args()
    if args.child:
        with quiet():
            found = run(args.child[0], int(args.child[1]))
        print(json.dumps(found))
        return
    steps, rounds = (8, 1) if args.quick else (12, 2)
    for kind in ("top-k", "dense"):
        store(kind)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            note(f"round {number + 1} of {rounds}, {arm}")
            runs[arm].append(child(arm, steps))
    seconds = {arm: float(np.min([one["seconds"] for one in runs[arm]], axis=0).mean()) for arm in ARMS}
    memory = {arm: min(one["memory"] for one in runs[arm]) for arm in ARMS}
    table(["arm", "step ÷ plain", "peak memory ÷ plain", "ms a step", "peak MB"],
          [[arm, f"{seconds[arm] / seconds['plain']:.2f}", f"{memory[arm] / memory['plain']:.2f}",
            f"{1000 * seconds[arm]:.0f}", f"{memory[arm] / 1e6:.0f}"] for arm in ARMS])  # fmt: skip


if __name__ == "__main__":
    main()
