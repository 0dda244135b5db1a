"""The whole story in one file: a teacher is trained and dumped, students are trained with and without it.

The text is the standard library's own source (`corpus.py`), so nothing is downloaded. What the teacher is, and what is
asked of it, is one of two stories: `quickstart_labels.py`, `quickstart_language.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .corpus import read_rows
from .store.errors import ConfigError

MADE = ("data", "teacher", "student.json", "store", "students", "quickstart.json")
WORK = "quickstart.json"
TASKS = ("text-classification", "causal-lm")


def _hidden(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "flag": False})


@dataclass
class QuickstartConfig:
    """What `predistill quickstart` may be told; fields without a flag are for tests, and for the curious."""

    output_dir: str = field(
        default="predistill-quickstart", metadata={"help": "Folder for all that is made; an earlier quickstart goes."}
    )
    task: str = field(default=TASKS[0], metadata={"help": "Which story.", "choices": TASKS})
    rows: int = _hidden(0, "Rows to train on; here and below 0 leaves it to the story.")
    labelled: int = _hidden(0, "How many of them keep their label, where rows have labels.")
    validation_rows: int = _hidden(0, "Rows to evaluate on.")
    vocabulary: int = _hidden(0, "Entries of the tokenizer.")
    teacher_epochs: float = _hidden(0, "Over all rows, with all labels.")
    student_steps: int = _hidden(0, "Of one batch.")
    seeds: tuple[int, ...] = _hidden((1, 2, 3), "Each student is trained once a seed.")


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run it all; returns {"output_dir", "columns", "table", "runs", "commands", "rows", "told", "seconds"}.

    Raises ConfigError.
    """
    began, folder = time.perf_counter(), fresh_folder(Path(config.output_dir))
    story, commands = story_of(config, folder), list[str]()

    say(f"1. {story.data}")
    counts = story.write_data()
    say(f"   {story.counted(counts)}")

    say(f"2. {story.teacher}")
    story.train_teacher()

    say(f"3. {story.dumping}")
    dump_teacher(story, commands)

    say("4. Students: the same small model, with and without the teacher's answers.")
    runs = train_students(story, commands)

    made = {
        "output_dir": str(folder), "columns": columns(story), "table": table(story, runs), "runs": runs,
        "commands": commands, "rows": counts, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    made["told"] = told(story, made)
    (folder / WORK).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made


def story_of(config: QuickstartConfig, folder: Path) -> Any:
    """The teller of `config.task`. Raises ConfigError."""
    if config.task not in TASKS:
        raise ConfigError(f"--task is one of {', '.join(TASKS)}; got {config.task!r}")
    if config.task == "causal-lm":
        from .quickstart_language import LanguageStory as Story
    else:
        from .quickstart_labels import LabelStory as Story  # type: ignore[assignment]
    return Story(folder, replace(config, **{name: getattr(config, name) or size for name, size in Story.sizes.items()}))


def told(story: Any, made: Mapping[str, Any]) -> str:
    """What the table means, and where everything is."""
    folder = story.folder
    store = shlex.quote(str(folder / "store"))
    where = "".join(f"{name:<10}{folder / name}\n" for name in ("data", "teacher", "store", "students"))
    return (
        f"{story.told(made['rows'], len(story.config.seeds))}\n\n{where}\n"
        f'Look around:\n  predistill info {store}\n  predistill query {store} "{story.query}"\n'
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


def fit(model: Any, samples: list[Any], tokenizer: Any, collator: Any, folder: Path, epochs: float,
        learning_rate: float, batch_size: int) -> None:  # fmt: skip
    """Train a teacher the usual way, nothing of predistill in it, and save it with its tokenizer."""
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, learning_rate=learning_rate, warmup_steps=0.1,
        weight_decay=0.01, per_device_train_batch_size=batch_size, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, processing_class=tokenizer,
                      data_collator=collator)  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the two phases ----


def dump_teacher(story: Any, commands: list[str]) -> None:
    from .teacher_dump.config import DumpConfig
    from .teacher_dump.dump import dump

    data = story.folder / "data"
    settings: dict[str, Any] = {
        "teacher": str(story.folder / "teacher"),
        "dataset": f"train={data / 'train.jsonl'},validation={data / 'validation.jsonl'}",
        "task": story.config.task,
        "output_dir": str(story.folder / "store"),
        **story.dump_settings,
    }
    show(commands, ["dump"], settings)
    dump(DumpConfig(**settings, keep_columns=["module"]))


def train_students(story: Any, commands: list[str]) -> list[dict[str, Any]]:
    """One run a seed and kind: labels only, and with the teacher's answers; the same number of steps for both."""
    from .student_train.train import train

    folder, config = story.folder, story.config
    (folder / "students").mkdir()
    runs = []
    for kind, own_settings in story.kinds.items():
        for seed in config.seeds:
            own: dict[str, Any] = {
                "student_config": str(folder / "student.json"),
                "output_dir": str(folder / "students" / f"{kind}-{seed}"),
                **own_settings,
            }
            training = {
                "learning_rate": story.learning_rate, "max_steps": config.student_steps,
                "per_device_train_batch_size": story.batch_size, "warmup_steps": 0.1, "weight_decay": 0.01,
                "seed": seed, "eval_strategy": "steps", "eval_steps": config.student_steps, "save_strategy": "no",
                "logging_strategy": "no", "per_device_eval_batch_size": 32,
            }  # fmt: skip
            show(commands, ["train", str(folder / "store")], {**own, **training}, shown=seed == config.seeds[0])
            with (folder / "students" / f"{kind}-{seed}.log").open("w") as log, contextlib.redirect_stderr(log):
                found = train({"stores": [str(folder / "store")], **own, "training_arguments": training})
            runs.append({"kind": kind, "seed": seed, **found})
            say(f"   {kind}, seed {seed}: {story.measure} {found[story.metric]:.3f}")
    return runs


def show(commands: list[str], words: list[str], settings: dict[str, Any], shown: bool = True) -> None:
    """The command that does the same as the call that follows."""
    for name, value in settings.items():
        words = [*words, "--" + name.replace("_", "-"), str(value)]
    commands.append(shlex.join(["predistill", *words]))
    if shown:
        say(f"   $ {commands[-1]}")


# ---- the table ----


def columns(story: Any) -> list[str]:
    return ["model", story.measure, "spread", "parameters", "MB", "ms/sample"]


def table(story: Any, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: `columns`. Time is of batches of 32 rows of validation, on this machine's CPU."""
    from .store import TeacherStore

    folder, config = story.folder, story.config
    with TeacherStore.open(folder / "store") as store:
        teacher = story.teacher_reached(store)
    lines = [{"model": "teacher", story.measure: round(teacher, 4), "spread": None,
              **weigh(story, folder / "teacher")}]  # fmt: skip
    for kind, name in story.names.items():
        reached = [run[story.metric] for run in runs if run["kind"] == kind]
        spread = statistics.stdev(reached) if len(reached) > 1 else None
        lines.append({"model": name, story.measure: round(statistics.mean(reached), 4),
                      "spread": None if spread is None else round(spread, 4),
                      **weigh(story, folder / "students" / f"{kind}-{config.seeds[0]}")})  # fmt: skip
    return lines


def weigh(story: Any, saved: Path) -> dict[str, Any]:
    """Parameters, size of the weights in MB (10^6 bytes), milliseconds a sample in batches of 32."""
    import torch
    import transformers

    model = getattr(transformers, story.auto_class).from_pretrained(saved).eval()
    texts = [row["text"] for row in read_rows(story.folder / "data/validation.jsonl")[:32]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
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
