"""Kill dumps with SIGKILL at random moments, through the real command line, and run the same command again at
once.

    python benchmarks/crash.py --kills 200

Each store must end with shards equal, byte for byte, to those of a dump that nobody interrupted, and
`verify` must find nothing. Exits 1 at the first difference. The teacher is a tiny random BERT over made-up
text: what is tried is the writing, and with a teacher this fast most of the time is start-up and commits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from predistill.benchmarks.measure import note, table

WORDS = [f"{first}{last}" for first in "badofigekulamenopi" for last in ("ra", "ne", "lo", "ti", "sum", "x", "port")]
ROWS = 1500
SHARD_SIZE = 6000  # bytes: some 80 shards


def make_teacher(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocab = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(path: Path, rng: random.Random) -> None:
    rows = [
        {"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 50))), "label": rng.randint(-1, 2)} for _ in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(work: Path, output: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "predistill",
        "dump",
        "--teacher",
        str(work / "teacher"),
        "--dataset",
        str(work / "rows.jsonl"),
        "--task",
        "text-classification",
        "--output-dir",
        str(output),
        "--shard-size",
        str(SHARD_SIZE),
        "--device",
        "cpu",
        "--tokens-per-batch",
        "512",
        "--keep-columns",
        "text",
        "--json",
    ]


def start(work: Path, output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(work / "stderr", "wb") as errors:
        return subprocess.Popen(command(work, output), stdout=subprocess.DEVNULL, stderr=errors, env=environment)


def finish(work: Path, output: Path) -> float:
    """The whole command, seconds; ends the script where it fails."""
    began = time.perf_counter()
    if start(work, output).wait():
        sys.exit(f"Error: {output}: {(work / 'stderr').read_text()}")
    return time.perf_counter() - began


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "shards").glob("*.arrow"))}


def committed(output: Path) -> int:
    return len(list((output / "shards").glob("*.json"))) if output.exists() else 0


def wait(process: subprocess.Popen[bytes], output: Path, rng: random.Random, whole: float, total: int) -> None:
    """One kill in three comes at any time of a whole dump; the others some commits on, since start-up is most of it."""
    if rng.random() < 1 / 3:
        time.sleep(rng.uniform(0, whole))
        return
    target = committed(output) + rng.randint(0, total // 3)
    while committed(output) < target and process.poll() is None and not (output / "store.json").exists():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))


def moment(output: Path, total: int) -> str:
    """Where a dump was when it was killed."""
    done = committed(output)
    if (output / "store.json").exists():
        return "store finished"
    return "before the first commit" if not done else "between commits" if done < total else "while finishing"


def check(output: Path, expected: dict[str, bytes]) -> None:
    from predistill.store.verify import verify

    found = shards(output)
    different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if different:
        sys.exit(f"Error: {output} differs from the uninterrupted dump in {', '.join(different)}")
    if problems := verify(output)["problems"]:
        sys.exit(f"Error: {output}: {problems}")


def run(work: Path, kills: int, rng: random.Random) -> tuple[Counter[str], int]:
    """(moments of the kills, stores that came to an end)."""
    (work / "teacher").mkdir()
    make_teacher(work / "teacher")
    make_rows(work / "rows.jsonl", rng)
    finish(work, work / "warm")
    whole = finish(work, work / "whole")
    expected = shards(work / "whole")
    note(f"uninterrupted: {len(expected)} shards in {whole:.1f} s")
    moments: Counter[str] = Counter()
    stores, output = 0, work / "store-0"
    while moments.total() < kills:
        process = start(work, output)
        wait(process, output, rng, whole, len(expected))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            moments[moment(output, len(expected))] += 1
            note(f"kill {moments.total()} of {kills}: {moment(output, len(expected))}")
        elif process.returncode:
            sys.exit(f"Error: {(work / 'stderr').read_text()}")
        if (output / "store.json").exists() or moments.total() == kills:
            finish(work, output)
            check(output, expected)
            shutil.rmtree(output)
            stores, output = stores + 1, work / f"store-{stores + 1}"
    return moments, stores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many dumps to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moments, stores = run(Path(folder), options.kills, random.Random(options.seed))
    table(["killed", "times"], sorted(moments.items()))
    print(f"{stores} stores, every shard equal to the uninterrupted dump's")


if __name__ == "__main__":
    main()
