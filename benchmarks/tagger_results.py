"""Does distillation from a store help a tagger that is no transformer? WNUT 17, three seeds, F1 of entities.

The teacher (tagger_teacher.py) is fine-tuned on the tags of all 3,394 training rows. The student `bilstm-cnn` begins
with random weights, or with word vectors out of the backbone's embeddings (tagger_vectors.py). Arms, all trained by
`train()`:

    few              tags of 1,000 rows only
    few + teacher    these tags, and the teacher's stored logits on all rows: --alpha 0.9 --temperature 1
    few + pseudo     the same, and the teacher's own tags on rows without any: --pseudo-labels 1
    few, vectors     as above, each beginning with word vectors
    few + teacher, vectors
    few + pseudo, vectors
    few + news, vectors  as few + pseudo, vectors, with 3,000 rows of AG News that have no tags
    all              tags of all rows
    all, vectors
    blocks           blocks 2 and 5 of the backbone and a new head: tags of 1,000 rows only
    blocks + pseudo  the same, and the teacher as in few + pseudo

16 rows a step, AdamW, linear warm-up over 10 % and decay, clip 1.0, batches grouped by length. `--tune` evaluates on
the last 400 training rows, which no arm then trains on; the evaluation split is for the table alone.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from predistill.benchmarks.measure import DATA, WORK, note, quiet, table
from predistill.benchmarks.seeds import TRAINING, all_measured, arguments, seed_cells
from predistill.benchmarks.tagger_teacher import FOLDER, TASK, read_rows

FEW, HELD_OUT, NEWS = 1000, 400, 3000  # rows
METRIC = "eval_f1"
VECTOR_SIZE = 100


class Arm(NamedTuple):
    """settings: of TrainConfig. rows: which store. epochs: of its own rows, of which `few` has fewer."""

    settings: dict[str, Any]
    epochs: float
    rows: str = "few"
    vectors: bool = False
    rate: float = 3e-3


LABELS: dict[str, Any] = {"alpha": 0.0}
LOGITS: dict[str, Any] = {"alpha": 0.9, "temperature": 1.0}
PSEUDO: dict[str, Any] = {**LOGITS, "pseudo_labels": 1.0}
BLOCKS: dict[str, Any] = {"student": "from-teacher-layers:2,5"}
ARMS = {
    "few": Arm(LABELS, 20),
    "few + teacher": Arm(LOGITS, 8),
    "few + pseudo": Arm(PSEUDO, 8),
    "few, vectors": Arm(LABELS, 20, vectors=True),
    "few + teacher, vectors": Arm(LOGITS, 8, vectors=True),
    "few + pseudo, vectors": Arm(PSEUDO, 8, vectors=True),
    "few + news, vectors": Arm(PSEUDO, 4, "news", vectors=True),
    "all": Arm(LABELS, 8, "all"),
    "all, vectors": Arm(LABELS, 8, "all", vectors=True),
    "blocks": Arm({**BLOCKS, **LABELS}, 8, rate=3e-4),
    "blocks + pseudo": Arm({**BLOCKS, **PSEUDO}, 3, rate=3e-4),
}


class Run(NamedTuple):
    arm: str
    seed: int
    epochs: float
    rate: float
    tune: bool = False

    @property
    def folder(self) -> Path:
        name = re.sub(r"[ ,+]+", "-", self.arm)
        return WORK / "runs" / f"wnut17_{name}_{self.seed}_{self.epochs}_{self.rate}{'_tune' if self.tune else ''}"


# ---- data, teacher, store, vectors: made once ----


def teacher() -> Path:
    if not (FOLDER / "config.json").exists():
        from predistill.benchmarks.tagger_teacher import fine_tune

        note(f"training a teacher for {TASK}")
        fine_tune(FOLDER, epochs=3, learning_rate=1.5e-4, batch_size=16, seed=0)
    return FOLDER


def news() -> list[dict[str, Any]]:
    """Rows of AG News, taken apart into words and signs, without tags."""
    with gzip.open(DATA / "ag_news" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(NEWS), file, strict=False)]
    return [{"tokens": re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", text)[:60], "ner_tags": None} for text in texts]


def dataset(rows: str) -> str:
    """What --dataset takes. `tune` is the last rows of train once more."""
    found = read_rows()
    kept = set(np.random.default_rng(0).choice(len(found) - HELD_OUT, FEW, replace=False).tolist())
    train = [row if rows == "all" or at in kept else {**row, "ner_tags": None} for at, row in enumerate(found)]
    parts = {"train": train + (news() if rows == "news" else []), "tune": found[-HELD_OUT:]}
    written = {name: _write(WORK / "data" / f"{TASK}-{rows}-{name}.jsonl.gz", part) for name, part in parts.items()}
    written["validation"] = DATA / TASK / "validation.jsonl.gz"
    return ",".join(f"{name}={path}" for name, path in written.items())


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def store(rows: str) -> Path:
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / f"{TASK}-{rows}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        settings: dict[str, Any] = {"task": "token-classification", "dtype": "float32", "max_length": 128}
        with quiet():
            dump(DumpConfig(teacher=str(teacher()), dataset=dataset(rows), output_dir=str(folder), **settings))
    return folder


def vectors(rows: str) -> Path:
    """Of the words of a store's train split."""
    from predistill.benchmarks import tagger_vectors
    from predistill.benchmarks.teachers import backbone

    path = WORK / "data" / f"{TASK}-{'news' if rows == 'news' else 'all'}-vectors.txt"
    if not path.exists():
        found = [row["tokens"] for row in (*read_rows(), *(news() if rows == "news" else ()))]
        words = tagger_vectors.words_of(found)
        tagger_vectors.write(path, words, tagger_vectors.vectors(backbone(), words, VECTOR_SIZE))
    return path


# ---- students ----


def train_student(run: Run) -> None:
    from predistill.benchmarks.teachers import backbone
    from predistill.student_train.train import train

    arm = ARMS[run.arm]
    more: dict[str, Any] = {"student": "bilstm-cnn", **arm.settings}
    if more["student"].startswith("from-teacher-layers"):
        more["teacher"] = str(backbone())
    if arm.vectors:
        more["student_vectors"] = str(vectors(arm.rows))
    held_out = len(read_rows()) - HELD_OUT
    train(
        {
            **more,
            "stores": [str(store(arm.rows))],
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "eval_split": "tune" if run.tune else "validation",
            "where": f"source_index < {held_out} OR source_index >= {held_out + HELD_OUT}" if run.tune else None,
            "training_arguments": {
                **TRAINING,
                "num_train_epochs": run.epochs,
                "learning_rate": run.rate,
                "per_device_train_batch_size": 16,
                "per_device_eval_batch_size": 64,
                "seed": run.seed,
            },
        }
    )


def runs_of(names: Sequence[str], seeds: Sequence[int], tune: bool = False) -> list[Run]:
    return [Run(name, seed, ARMS[name].epochs, ARMS[name].rate, tune) for seed in seeds for name in names]


def all_of(runs: Sequence[Run]) -> list[float]:
    for run in runs:  # stores and vectors first, and one at a time
        store(ARMS[run.arm].rows)
        if ARMS[run.arm].vectors:
            vectors(ARMS[run.arm].rows)
    return all_measured(__file__, METRIC, runs)


def teacher_f1() -> float:
    """The teacher on the evaluation split, from the store's logits."""
    from predistill.store import TeacherStore
    from predistill.student_train.metrics import tag_metrics_for
    from transformers import EvalPrediction

    with TeacherStore.open(store("few")) as opened:
        rows = opened.select(split="validation", fields=["teacher_logits"])
        batch = rows[np.arange(len(rows))]
        scores = tag_metrics_for(opened.label_names)(EvalPrediction(batch["teacher_logits"], batch["labels"]))
    return float(scores["f1"])


def report(names: Sequence[str], seeds: Sequence[int], tune: bool) -> None:
    runs = runs_of(names, seeds, tune)
    f1 = dict(zip(runs, all_of(runs), strict=True))
    rows: list[list[object]] = []
    if not tune:
        rows.append(["the teacher", "", *("" for _ in seeds), f"{100 * teacher_f1():.1f}", ""])
    for name in names:
        found = [100 * value for run, value in f1.items() if run.arm == name]
        rows.append([name, f"{ARMS[name].epochs:g}", *seed_cells(found, 1)])
    print(f"F1 of entities on {'held-out training rows' if tune else 'validation'}, in percent\n")
    table(["arm", "epochs", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def main() -> None:
    args = arguments(__doc__, ARMS, Run, train_student, tune="on held-out training rows, one seed")
    report(args.arm, args.seeds[:1] if args.tune else args.seeds, args.tune)


if __name__ == "__main__":
    main()
