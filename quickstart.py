"""The whole story in one file: a teacher is trained and dumped, students are trained with and without it.

The text is the standard library's own source (`corpus.py`), so nothing is downloaded. The question: which package is
a passage from? The setting is one in which distillation pays: few rows have a label, the others
only what the teacher makes of them. With every row labelled there would be little to gain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .store.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMNS = ("model", "accuracy", "spread", "parameters", "MB", "ms/sample")
MADE = ("data", "teacher", "student.json", "store", "students", "quickstart.json")
WORK = "quickstart.json"


def _hidden(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "flag": False})


@dataclass
class QuickstartConfig:
    """What `predistill quickstart` may be told; fields without a flag are for tests, and for the curious."""

    output_dir: str = field(
        default="predistill-quickstart", metadata={"help": "Folder for all that is made; an earlier quickstart goes."}
    )
    task: str = field(
        default="text-classification", metadata={"help": "Which story.", "choices": ("text-classification",)}
    )
    rows: int = _hidden(5000, "Passages to train on.")
    labelled: int = _hidden(250, "How many of them keep their label.")
    validation_rows: int = _hidden(1500, "Passages to evaluate on.")
    vocabulary: int = _hidden(4000, "Entries of the tokenizer.")
    teacher_epochs: float = _hidden(5, "Over all rows, with all labels.")
    student_steps: int = _hidden(600, "Of 32 rows.")
    seeds: tuple[int, ...] = _hidden((1, 2, 3), "Each student is trained once a seed.")


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run it all; returns {"output_dir", "table", "runs", "commands", "rows", "seconds"}. Raises ConfigError."""
    began, folder = time.perf_counter(), fresh_folder(Path(config.output_dir))
    commands: list[str] = []

    say("1. Text: passages of Python's standard library, labelled by the package they are from.")
    counts = write_data(folder / "data", config)
    say(f"   {counts['training']} to train on, of which {counts['labelled']} keep their label; "
        f"{counts['validation']} of other modules to validate on.")  # fmt: skip

    say("2. Teacher: a small BERT, trained on every label. This takes the longest.")
    train_teacher(folder, config)

    say("3. Dump: the teacher runs once over every row, labelled or not.")
    dump_teacher(folder, commands)

    say("4. Students: the same small model, with and without the teacher's answers.")
    runs = train_students(folder, config, commands)

    made = {
        "output_dir": str(folder), "table": table(folder, runs, config), "runs": runs, "commands": commands,
        "rows": counts, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    (folder / WORK).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made


def told(made: Mapping[str, Any]) -> str:
    """What the table means, and where everything is."""
    folder, rows = Path(made["output_dir"]), made["rows"]
    store = shlex.quote(str(folder / "store"))
    where = "".join(f"{name:<10}{folder / name}\n" for name in ("data", "teacher", "store", "students"))
    return (
        f"accuracy: on {rows['validation']} passages of modules that nobody was trained on; mean and standard\n"
        f"deviation over {len(made['runs']) // 2} seeds. Both students see {rows['labelled']} labels; "
        "the distilled one also learns from\n"
        f"the teacher's answers to all {rows['training']} passages. That is where distillation pays: "
        f"many rows, few\nlabels. With a label on every row, expect little.\n\n{where}\n"
        f"Look around:\n  predistill info {store}\n"
        f'  predistill query {store} "SELECT label, avg(teacher_entropy) FROM samples GROUP BY label"\n'
        f"({made['seconds']:.0f} seconds in all)"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fresh_folder(folder: Path) -> Path:
    """An empty folder; what an earlier quickstart made there is removed. Raises ConfigError for anything else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder}: a folder expected; there is a file of that name")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if strange := sorted(found - set(MADE)):
        raise ConfigError(f"--output-dir {folder} holds {strange[0]}, which no quickstart made; give an empty folder")
    for name in found:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir()
    return folder


# ---- text ----


def write_data(folder: Path, config: QuickstartConfig) -> dict[str, int]:
    """all.jsonl has every label, train.jsonl few of them, validation.jsonl is other modules."""
    from . import corpus

    training, validation = (
        sorted(rows, key=_digest)[:count]
        for rows, count in zip(corpus.rows(), (config.rows, config.validation_rows), strict=True)
    )
    kept = set(random.Random(0).sample(range(len(training)), min(config.labelled, len(training))))
    few = [{**row, "label": row["label"] if at in kept else None} for at, row in enumerate(training)]
    for name, rows in (("all", training), ("train", few), ("validation", validation)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"training": len(training), "labelled": len(kept), "validation": len(validation)}


def _digest(row: dict[str, str]) -> bytes:
    return hashlib.sha256(row["text"].encode()).digest()


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- teacher: the usual way, nothing of predistill in it ----


def train_teacher(folder: Path, config: QuickstartConfig) -> None:
    """A tokenizer and a BERT of 2 layers, 128 wide, saved to folder/teacher."""
    from transformers import (
        BertForSequenceClassification,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.utils import logging

    from .corpus import FAMILIES

    rows, names = read_rows(folder / "data/all.jsonl"), list(FAMILIES)
    tokenizer = train_tokenizer([row["text"] for row in rows], config.vocabulary)
    encoded = tokenizer([row["text"] for row in rows], truncation=True)["input_ids"]
    samples = [{"input_ids": ids, "labels": names.index(row["label"])} for ids, row in zip(encoded, rows, strict=True)]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    set_seed(0)
    model = BertForSequenceClassification(bert(128, 2, tokenizer, names))
    arguments = TrainingArguments(
        output_dir=str(folder / "teacher"), num_train_epochs=config.teacher_epochs, learning_rate=1e-3,
        warmup_steps=0.1, weight_decay=0.01, per_device_train_batch_size=32, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, processing_class=tokenizer,
                      data_collator=DataCollatorWithPadding(tokenizer))  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    bert(64, 1, tokenizer, names).to_json_file(folder / "student.json")


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """WordPiece, lower case, at most 64 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special,
                                                              show_progress=False))  # fmt: skip
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, special.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def bert(width: int, layers: int, tokenizer: PreTrainedTokenizerFast, names: list[str]) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=2 * width, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)), label2id={name: at for at, name in enumerate(names)},
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip


# ---- the two phases ----


def dump_teacher(folder: Path, commands: list[str]) -> None:
    from .teacher_dump.config import DumpConfig
    from .teacher_dump.dump import dump

    data = folder / "data"
    settings: dict[str, Any] = {
        "teacher": str(folder / "teacher"),
        "dataset": f"train={data / 'train.jsonl'},validation={data / 'validation.jsonl'}",
        "task": "text-classification",
        "output_dir": str(folder / "store"),
    }
    show(commands, ["dump"], settings)
    dump(DumpConfig(**settings, keep_columns=["module"]))


def train_students(folder: Path, config: QuickstartConfig, commands: list[str]) -> list[dict[str, Any]]:
    """One run a seed and kind: labels only, and with the teacher's answers; the same number of steps for both."""
    from .student_train.train import train

    (folder / "students").mkdir()
    runs = []
    for kind, alpha in (("labels", 0.0), ("distilled", 0.9)):
        for seed in config.seeds:
            own: dict[str, Any] = {
                "student_config": str(folder / "student.json"),
                "output_dir": str(folder / "students" / f"{kind}-{seed}"),
                "alpha": alpha,
            }
            training = {
                "learning_rate": 3e-3, "max_steps": config.student_steps, "per_device_train_batch_size": 32,
                "warmup_steps": 0.1, "weight_decay": 0.01, "seed": seed, "eval_strategy": "steps",
                "eval_steps": config.student_steps, "save_strategy": "no", "logging_strategy": "no",
                "per_device_eval_batch_size": 32,
            }  # fmt: skip
            show(commands, ["train", str(folder / "store")], {**own, **training}, shown=seed == config.seeds[0])
            with (folder / "students" / f"{kind}-{seed}.log").open("w") as log, contextlib.redirect_stderr(log):
                found = train({"stores": [str(folder / "store")], **own, "training_arguments": training})
            runs.append({"kind": kind, "seed": seed, **found})
            say(f"   {kind}, seed {seed}: accuracy {found['eval_accuracy']:.3f}")
    return runs


def show(commands: list[str], words: list[str], settings: dict[str, Any], shown: bool = True) -> None:
    """The command that does the same as the call that follows."""
    for name, value in settings.items():
        words = [*words, "--" + name.replace("_", "-"), str(value)]
    commands.append(shlex.join(["predistill", *words]))
    if shown:
        say(f"   $ {commands[-1]}")


# ---- the table ----


def table(folder: Path, runs: list[dict[str, Any]], config: QuickstartConfig) -> list[dict[str, Any]]:
    """One row a model: COLUMNS. Time is of batches of 32 rows of validation, on this machine's CPU."""
    from .store import TeacherStore

    with TeacherStore.open(folder / "store") as store:
        right = "SELECT avg((label = teacher_prediction)::INT) FROM samples WHERE split = 'validation'"
        [(teacher,)] = store.sql(right).fetchall()
    lines = [{"model": "teacher", "accuracy": round(teacher, 4), "spread": None,
              **weigh(folder / "teacher", folder)}]  # fmt: skip
    for kind, name in (
        ("labels", f"student, {config.labelled} labels"),
        ("distilled", "student, the same and the teacher"),
    ):
        reached = [run["eval_accuracy"] for run in runs if run["kind"] == kind]
        spread = statistics.stdev(reached) if len(reached) > 1 else None
        lines.append({"model": name, "accuracy": round(statistics.mean(reached), 4),
                      "spread": None if spread is None else round(spread, 4),
                      **weigh(folder / "students" / f"{kind}-{config.seeds[0]}", folder)})  # fmt: skip
    return lines


def weigh(saved: Path, folder: Path) -> dict[str, Any]:
    """Parameters, size of the weights in MB (10^6 bytes), milliseconds a sample in batches of 32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    texts = [row["text"] for row in read_rows(folder / "data/validation.jsonl")[:32]]
    batch = AutoTokenizer.from_pretrained(saved)(texts, padding=True, truncation=True, return_tensors="pt")
    times = []
    with torch.inference_mode():
        for _ in range(12):
            began = time.perf_counter()
            model(**batch)
            times.append((time.perf_counter() - began) / len(texts))
    return {
        "parameters": model.num_parameters(),
        "MB": round(os.path.getsize(saved / "model.safetensors") / 1e6, 2),
        "ms/sample": round(1000 * statistics.median(times[2:]), 3),
    }
