"""Do a reader's students learn from what is stored, and from more passages? SQuAD's sentences, three seeds.

The teacher and the data are those of reader_teacher.py; the students have its blocks 3 and 6, and learn from 960 of
the 6,823 questions that it was fine-tuned on. Arms, each trained by one `train()`, with as many steps but for the first
stage of `haystack`:

    labels       the answers alone
    logits       --preset haystack --stage prediction: KL at T 1 to the teacher's logits and the answers, half and half
    haystack     --preset haystack: hidden states and attentions first, then the same
    augmented    as logits, on the passages and three rewritten ones of each (`augment`; the model of masked_lm.py)

32 rows a step, AdamW, linear warm-up over 10 % and decay, clip 1.0. Evaluated on 612 validation questions by SQuAD's
own measures. One run after another, each a process of one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from predistill.benchmarks.measure import WORK, note, quiet, table
from predistill.benchmarks.seeds import TRAINING, arguments, measured, seed_cells

QUESTIONS, VIEWS = 960, 3
STUDENT = "from-teacher-layers:3,6"
STEPS, INNER_STEPS = 60, 40  # of 32 rows: two epochs of 960 questions, and more than one
RATE = 3e-4
PREDICTION = {"preset": "haystack", "stage": "prediction"}
ARMS: dict[str, dict[str, Any]] = {
    "labels": {"alpha": 0.0},
    "logits": PREDICTION,
    "haystack": {"preset": "haystack", "stages": {"intermediate": {"max_steps": INNER_STEPS}}},
    "augmented": PREDICTION,
}


class Run(NamedTuple):
    arm: str
    seed: int
    student: str = STUDENT
    steps: int = STEPS
    rate: float = RATE

    @property
    def folder(self) -> Path:
        return WORK / "runs" / ("reader_" + "_".join(map(str, self)).replace(":", "-"))


def augmented() -> Path:
    """SQuAD JSON of the passages and of VIEWS rewritten ones of each."""
    from predistill.benchmarks.masked_lm import masked_lm
    from predistill.benchmarks.reader_teacher import sentences
    from predistill.teacher_dump.augment import augment
    from predistill.teacher_dump.augmentation.config import AugmentConfig

    path = WORK / "data" / f"squad-sentences-train-{QUESTIONS}-augmented.json"
    if not path.exists():
        with quiet():
            augment(AugmentConfig(str(sentences("train", QUESTIONS)), str(path), masked_lm=str(masked_lm()),
                                  multiplication_factor=VIEWS))  # fmt: skip
    return path


def store(arm: str) -> Path:
    """The teacher's logits; of the passages as they are, every third hidden state and attention too."""
    from predistill.benchmarks.reader_teacher import MAX_LENGTH, sentences, teacher
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    more = arm == "augmented"
    folder = WORK / "stores" / f"squad-sentences-{QUESTIONS}{'-augmented' if more else ''}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        train = augmented() if more else sentences("train", QUESTIONS)
        inner: dict[str, Any] = {"layers": "0,3,6", "fields": ["logits", "hidden_states", "attentions"]}
        with quiet():
            dump(
                DumpConfig(
                    teacher=str(teacher()), dataset=f"train={train},validation={sentences('validation')}",
                    task="question-answering", output_dir=str(folder), max_length=MAX_LENGTH,
                    **({} if more else inner),
                )
            )  # fmt: skip
    return folder


def train_student(run: Run) -> None:
    from predistill.benchmarks.reader_teacher import teacher
    from predistill.student_train.train import train

    train(
        {
            **ARMS[run.arm],
            "stores": [str(store(run.arm))],
            "student": run.student,
            "teacher": str(teacher()),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "training_arguments": {
                **TRAINING,
                "max_steps": run.steps,
                "learning_rate": run.rate,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 32,
                "seed": run.seed,
            },
        }
    )


def report(arms: list[str], seeds: tuple[int, ...]) -> None:
    for arm in arms:
        store(arm)
    runs = [Run(arm, seed) for seed in seeds for arm in arms]
    scores = {run: [measured(__file__, f"eval_{name}", run) for name in ("exact_match", "f1")] for run in runs}
    teacher = [measured(__file__, f"eval_teacher_{name}", runs[0]) for name in ("exact_match", "f1")]
    for at, name in enumerate(("exact match", "F1")):
        rows: list[list[object]] = [["the teacher, 6 blocks", *("" for _ in seeds), f"{teacher[at]:.1f}", ""]]
        rows += [[arm, *seed_cells([scores[run][at] for run in runs if run.arm == arm], 1)] for arm in arms]
        table([name, *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def main() -> None:
    args = arguments(__doc__, ARMS, Run, train_student)
    report(args.arm, args.seeds)


if __name__ == "__main__":
    main()
