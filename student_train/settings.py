"""Every setting of `predistill train` that is our own; flags are these names in kebab-case.

Nothing heavy is imported: the command line reads this file to print its help.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..store.errors import ConfigError
from .ensembles.settings import EnsembleSettings
from .losses.presets import PRESETS, Stage
from .losses.terms import Term, mapped, mixture, parse_losses

DEFAULT_LOSS = "kl"
DEFAULT_TEMPERATURE = 2.0
DEFAULT_ALPHA = 0.7
SHUFFLES = ("auto", "global", "window")
PIXEL_CHECKS = ("warn", "refuse", "off")
FROM_TEACHER_LAYERS = "from-teacher-layers:"
BILSTM_CNN = "bilstm-cnn"
ONLY_STAGE = "distillation"
HAYSTACK_LOSSES = {"kl_div": "kl", "mse": "mse"}


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class DistillationSettings:
    """What is learnt from, and in which order rows are read. Raises ConfigError for values out of range."""

    preset: str | None = _setting(
        None,
        "A published recipe: its loss, its stages, and its temperature, alpha, epochs and learning rates where these "
        f"are not given: {', '.join(PRESETS)}.",
    )
    stage: str | None = _setting(None, "Train on this stage of the recipe alone.")
    loss: str = _setting(
        DEFAULT_LOSS,
        "What is compared with the teacher, options after a colon. Logits: kl, jsd:beta=0.5, kl:standardize or, where "
        "only the largest are stored, kl:tail=renormalize. What is inside: hidden_states, hidden_states/cosine, "
        "attentions/kl:layers=last, relations/minilm, …; several between spaces, each with its :weight=.",
    )
    layer_map: str | None = _setting(
        None,
        "Which layer learns from which: uniform, last, every-2, …, or student:teacher pairs, as 0:0,1:2,2:4. Default: "
        "the loss's own.",
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
    distillation_loss: str | None = _setting(
        None, "Haystack's name of --loss: kl_div or mse; with a preset, instead of its comparison of logits.",
        choices=tuple(HAYSTACK_LOSSES),
    )  # fmt: skip
    distillation_loss_weight: float | None = _setting(None, "Haystack's name of --alpha.")
    pseudo_labels: float = _setting(
        0.0, "Weight of cross entropy to the teacher's own prediction on rows without a label."
    )
    pseudo_label_confidence: float = _setting(
        0.0,
        "Leave out rows whose teacher gives its prediction less probability than this.",
        unit="probability",
    )
    max_answer_length: int = _setting(30, "Longest answer that evaluation takes from a text.", unit="tokens")
    no_answer_threshold: float = _setting(
        0.0,
        "Where some questions have no answer: how much higher than the best answer's the score of none must be for "
        "none to be given.",
    )
    pixel_check: str = _setting(
        "warn", "Where rebuilt images are not what the teacher saw, bit for bit: say so, or refuse to train.",
        choices=PIXEL_CHECKS,
    )  # fmt: skip
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
        self._take_aliases()
        _within("temperature", self.temperature, 1e-3, 1e6)
        _within("alpha", self.alpha, 0, 1)
        _within("pseudo_labels", self.pseudo_labels, 0, 1e6)
        _within("pseudo_label_confidence", self.pseudo_label_confidence, 0, 1)
        if self.pseudo_label_confidence and not self.pseudo_labels:
            raise ConfigError("--pseudo-label-confidence is for --pseudo-labels; give both")
        _within("shuffle_window", self.shuffle_window, 1, 2**62)
        _within("max_answer_length", self.max_answer_length, 1, 2**31)
        _within("no_answer_threshold", self.no_answer_threshold, -1e6, 1e6)
        if self.pixel_check not in PIXEL_CHECKS:
            raise ConfigError(f"--pixel-check is one of {', '.join(PIXEL_CHECKS)}; got {self.pixel_check!r}")
        if self.shuffle not in SHUFFLES:
            raise ConfigError(f"--shuffle is one of {', '.join(SHUFFLES)}; got {self.shuffle!r}")
        self.recipe()

    def terms(self, temperature: float = DEFAULT_TEMPERATURE) -> tuple[Term, ...]:
        """The weighted terms of a recipe of one stage; temperature: where none is asked for.

        Raises ConfigError for a recipe of several.
        """
        stages = self.recipe(temperature)
        if len(stages) > 1:
            names = ", ".join(stage.name for stage in stages)
            raise ConfigError(f"preset {self.preset} has the stages {names}; a trainer takes one: say which by stage=")
        return stages[0].terms

    def recipe(self, temperature: float = DEFAULT_TEMPERATURE) -> tuple[Stage, ...]:
        """What is trained on, one stage after another; terms of weight 0 are left out."""
        stages = self._published() if self.preset is not None else (Stage(ONLY_STAGE, self._mixture(temperature)),)
        *before, last = stages
        stages = (*before, replace(last, terms=(*last.terms, *self._pseudo_labels())))
        return self._chosen(_mapped_stages(stages, self.layer_map))

    def _published(self) -> tuple[Stage, ...]:
        if self.preset not in PRESETS:
            raise ConfigError(f"--preset is one of {', '.join(PRESETS)}; got {self.preset!r}")
        if self.loss.strip() != DEFAULT_LOSS:
            raise ConfigError(f"--preset {self.preset} has a loss of its own; leave out --loss")
        stages = PRESETS[self.preset](temperature=self.temperature, alpha=self.alpha)
        if self.distillation_loss is None:
            return stages
        loss = HAYSTACK_LOSSES[self.distillation_loss]
        return tuple(
            replace(stage, terms=tuple(
                replace(term, loss=loss, options={}) if term.name == "logits" else term for term in stage.terms
            )) for stage in stages
        )  # fmt: skip

    def _take_aliases(self) -> None:
        """Haystack's names become ours; its loss stays where a preset has one of its own. Raises ConfigError."""
        if self.distillation_loss is not None and self.distillation_loss not in HAYSTACK_LOSSES:
            allowed = ", ".join(HAYSTACK_LOSSES)
            raise ConfigError(f"--distillation-loss is one of {allowed}; got {self.distillation_loss!r}")
        if self.distillation_loss_weight is not None:
            if self.alpha is not None:
                raise ConfigError("--distillation-loss-weight is --alpha by another name; give one of them")
            self.alpha, self.distillation_loss_weight = self.distillation_loss_weight, None
        if self.distillation_loss is not None and self.loss.strip() != DEFAULT_LOSS:
            raise ConfigError("--distillation-loss is --loss by another name; give one of them")
        if self.distillation_loss is not None and self.preset is None:
            self.loss, self.distillation_loss = HAYSTACK_LOSSES[self.distillation_loss], None

    def _mixture(self, default: float) -> tuple[Term, ...]:
        terms = parse_losses(self.loss)
        if len(terms) == 1 and terms[0].weight != 1:
            raise ConfigError(f"--loss {self.loss}: the teacher's part is weighed by --alpha, not by weight=")
        alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        return mixture(alpha, *(self._tempered(term, default) for term in terms))

    def _tempered(self, term: Term, default: float) -> Term:
        if term.name != "logits":
            return term
        return replace(term, temperature=term.temperature or self.temperature or default)

    def _pseudo_labels(self) -> tuple[Term, ...]:
        if not self.pseudo_labels:
            return ()
        options = {"threshold": self.pseudo_label_confidence}
        return (Term("pseudo_labels", weight=self.pseudo_labels, options=options),)

    def _chosen(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if self.stage is None:
            return stages
        found = tuple(stage for stage in stages if stage.name == self.stage)
        if not found:
            raise ConfigError(f"--stage is one of {', '.join(stage.name for stage in stages)}; got {self.stage!r}")
        return found


def _mapped_stages(stages: tuple[Stage, ...], layers: str | None) -> tuple[Stage, ...]:
    """With this layer map where there are layers. Raises ConfigError where no stage has any."""
    if layers is None:
        return stages
    mapped([term for stage in stages for term in stage.terms], layers)
    return tuple(
        replace(stage, terms=mapped(stage.terms, layers)) if any("layers" in term.options for term in stage.terms)
        else stage for stage in stages
    )  # fmt: skip


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"--{name.replace('_', '-')} lies between {low:g} and {high:g}; got {value!r}")


@dataclass
class TrainConfig(EnsembleSettings, DistillationSettings):
    """One run of `predistill train`; fields of transformers.TrainingArguments go into `training_arguments`."""

    stores: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of teacher outputs made by `predistill dump`.", "argument": True},
    )
    student: str | None = _setting(
        None, "Student: a Hub id, a folder, from-teacher-layers:1,3,5 (copies these blocks of the teacher, counted "
        "from 1), or, to tag words, bilstm-cnn (no transformer; about 3M parameters)."
    )  # fmt: skip
    student_config: str | None = _setting(
        None, "Student with random weights: a config.json, or a folder that holds one."
    )
    student_vectors: str | None = _setting(
        None, "Text file of word vectors, as of word2vec or GloVe, that a new bilstm-cnn begins with; .gz too."
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
    stages: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={
            "help": "What is trained on one after another, as JSON or in the --config file: by name, settings of the "
            'loss (unless a preset says them) and training arguments, {"intermediate": {"num_train_epochs": 5}}.',
        },
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
        self.check_ensemble_values()

    def recipe(self, temperature: float = DEFAULT_TEMPERATURE) -> tuple[Stage, ...]:
        if not self.stages:
            return super().recipe(temperature)
        if self.preset is None:
            return self._chosen(tuple(self._stage(name, own, temperature) for name, own in self._given_stages()))
        published = super().recipe(temperature)
        names = [stage.name for stage in published]
        for name, own in self._given_stages():
            if name not in names:
                raise ConfigError(f"stages: preset {self.preset} has {', '.join(names)}; got {name!r}")
            if taken := [key for key in own if key in _LOSS_SETTINGS]:
                raise ConfigError(f"stages: {name}: the preset says its {taken[0]}; leave it out, or write all stages")
        return tuple(replace(stage, given=self.stages.get(stage.name) or {}) for stage in published)

    def _given_stages(self) -> list[tuple[str, Mapping[str, Any]]]:
        if not isinstance(self.stages, Mapping):
            raise ConfigError(f"--stages: names with their settings, as a JSON object, expected; got {self.stages!r}")
        for name, own in self.stages.items():
            if not (_STAGE_NAME.fullmatch(str(name)) and isinstance(own or {}, Mapping)):
                raise ConfigError(f"stages: a name of letters, digits and - with its settings expected; got {name!r}")
        return [(name, own or {}) for name, own in self.stages.items()]

    def _stage(self, name: str, own: Mapping[str, Any], temperature: float) -> Stage:
        """A stage written out: the run's settings of the loss, but for those that it has of its own."""
        shared = {key: getattr(self, key) for key in _LOSS_SETTINGS}
        loss = {key: value for key, value in own.items() if key in _LOSS_SETTINGS}
        shared |= {name: _UNSAID[name] for alias, name in _ALIASES.items() if alias in own}
        terms = DistillationSettings(**{**shared, **loss}).terms(temperature)
        return Stage(name, terms, given={key: value for key, value in own.items() if key not in _LOSS_SETTINGS})


_ALIASES = {"distillation_loss": "loss", "distillation_loss_weight": "alpha"}
_UNSAID: dict[str, Any] = {"loss": DEFAULT_LOSS, "alpha": None}
_LOSS_SETTINGS = (
    "loss", "temperature", "alpha", "layer_map", "pseudo_labels", "pseudo_label_confidence", *_ALIASES,
)  # fmt: skip
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
