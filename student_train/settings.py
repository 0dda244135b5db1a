"""Every setting of `predistill train` that is our own; flags are these names in kebab-case.

Nothing heavy is imported: the command line reads this file to print its help.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..store.errors import ConfigError
from .losses.terms import PRESETS, Term, mixture, parse_loss

DEFAULT_LOSS = "kl"
DEFAULT_TEMPERATURE = 2.0
DEFAULT_ALPHA = 0.7
SHUFFLES = ("auto", "global", "window")
FROM_TEACHER_LAYERS = "from-teacher-layers:"


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class DistillationSettings:
    """What is learnt from, and in which order rows are read. Raises ConfigError for values out of range."""

    preset: str | None = _setting(
        None, "A published recipe: its loss, and its temperature and alpha where these are not given."
    )
    loss: str = _setting(
        DEFAULT_LOSS,
        "Loss between the logits of both, its options after a colon, as in jsd:beta=0.5, kl:standardize or, where "
        "only the largest logits are stored, kl:tail=renormalize.",
    )
    temperature: float | None = _setting(
        None,
        "Softens both sides of the teacher's part, whose loss is multiplied by its square. Default: 2; 1 for "
        "language models.",
    )
    alpha: float | None = _setting(
        None,
        "Weight of the teacher's part; 1 - alpha weighs the labels. 0 trains on labels only. Default: 0.7.",
    )
    pseudo_labels: float = _setting(
        0.0, "Weight of cross entropy to the teacher's own prediction on rows without a label."
    )
    pseudo_label_confidence: float = _setting(
        0.0,
        "Leave out rows whose teacher gives its prediction less probability than this.",
        unit="probability",
    )
    shuffle: str = _setting(
        "auto", "Shuffle all rows (global), or within windows that are read together; auto: what memory holds.",
        choices=SHUFFLES,
    )  # fmt: skip
    shuffle_window: int | None = _setting(
        None, "Bytes of rows that a window holds at once. Default: half of the memory.", unit="bytes"
    )

    def __post_init__(self) -> None:
        self.check_settings()

    def check_settings(self) -> None:
        _within("temperature", self.temperature, 1e-3, 1e6)
        _within("alpha", self.alpha, 0, 1)
        _within("pseudo_labels", self.pseudo_labels, 0, 1e6)
        _within("pseudo_label_confidence", self.pseudo_label_confidence, 0, 1)
        if self.pseudo_label_confidence and not self.pseudo_labels:
            raise ConfigError("--pseudo-label-confidence is for --pseudo-labels; give both")
        _within("shuffle_window", self.shuffle_window, 1, 2**62)
        if self.shuffle not in SHUFFLES:
            raise ConfigError(f"--shuffle is one of {', '.join(SHUFFLES)}; got {self.shuffle!r}")
        self.terms()

    def terms(self, temperature: float = DEFAULT_TEMPERATURE) -> tuple[Term, ...]:
        """The weighted terms of the loss; terms of weight 0 are left out. temperature: where none is asked for."""
        return (*self._mixture(temperature), *self._pseudo_labels())

    def _mixture(self, default: float) -> tuple[Term, ...]:
        term = parse_loss(self.loss)
        if term.weight != 1:
            raise ConfigError(f"--loss {self.loss}: the teacher's part is weighed by --alpha, not by weight=")
        if self.preset is not None:
            if self.preset not in PRESETS:
                raise ConfigError(f"--preset is one of {', '.join(PRESETS)}; got {self.preset!r}")
            if term != parse_loss(DEFAULT_LOSS):
                raise ConfigError(f"--preset {self.preset} has a loss of its own; leave out --loss")
            return PRESETS[self.preset](temperature=self.temperature, alpha=self.alpha)
        temperature = term.temperature or self.temperature or default
        alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        return mixture(alpha, replace(term, temperature=temperature))

    def _pseudo_labels(self) -> tuple[Term, ...]:
        if not self.pseudo_labels:
            return ()
        options = {"threshold": self.pseudo_label_confidence}
        return (Term("pseudo_labels", weight=self.pseudo_labels, options=options),)


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"--{name.replace('_', '-')} lies between {low:g} and {high:g}; got {value!r}")


@dataclass
class TrainConfig(DistillationSettings):
    """One run of `predistill train`; fields of transformers.TrainingArguments go into `training_arguments`."""

    stores: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of teacher outputs made by `predistill dump`.", "argument": True},
    )
    student: str | None = _setting(
        None, "Student: a Hub id, a folder, or from-teacher-layers:1,3,5 (copies these blocks of the teacher, "
        "counted from 1)."
    )  # fmt: skip
    student_config: str | None = _setting(
        None, "Student with random weights: a config.json, or a folder that holds one."
    )
    teacher: str | None = _setting(
        None,
        "Folder or Hub id that from-teacher-layers copies weights from. Default: the one the store names.",
    )
    output_dir: str | None = _setting(None, "Folder for the student, its metrics, card and checkpoints.")
    overwrite_output_dir: bool = _setting(False, "Start anew in a folder that holds another run, whose checkpoints go.")
    where: str | None = _setting(
        None, 'Train only on rows that a SQL condition keeps, as in "teacher_confidence < 0.95".'
    )
    train_split: str = _setting("train", "Split to train on.")
    eval_split: str | None = _setting(None, "Split to evaluate on. Default: validation, else test, where there is one.")
    text_column: str | None = _setting(
        None,
        "Kept column to tokenise anew for a student with another tokenizer. Default: the dump's text column.",
    )
    resume_from_checkpoint: str | None = _setting(
        None, "Go on from a checkpoint folder, or from the last one in the output directory: true."
    )
    training_arguments: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Any field of transformers.TrainingArguments, by name.", "flag": False},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stores:
            raise ConfigError("a store is missing, as in: predistill train stores/sst2 --student …")
        if not self.output_dir:
            raise ConfigError("--output-dir is missing: a folder for the student")
        if (self.student is None) == (self.student_config is None):
            given = "neither" if self.student is None else "both"
            raise ConfigError(f"one of --student and --student-config is expected; got {given}")
        if "output_dir" in self.training_arguments:
            raise ConfigError("output_dir is a setting of its own, not one of training_arguments")
