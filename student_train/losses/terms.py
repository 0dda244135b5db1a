"""What a run may ask of its loss: terms, their options, and the published recipes.

No torch here: settings and the command line import this file. The functions are in `rows.LOGIT_FUNCTIONS`,
under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...store.errors import ConfigError

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)


@dataclass(frozen=True)
class Option:
    """One number of a loss: its default and its allowed range, both ends included."""

    default: float
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class LossSpec:
    """One loss: its formula, the heads (transformers' `problem_type`) it is defined for, its options.

    truncated: is it defined where the teacher's distribution is known at some classes only (sparse.py)?
    """

    formula: str
    heads: tuple[str, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    truncated: bool = False


TAILS = ("bucket", "renormalize", "ignore")  # what becomes of the classes that were not kept: see sparse.py

_CLASSES = (SINGLE_LABEL, MULTI_LABEL)

# p teacher, q student, both at temperature T; z logits. Every one is times T^2.
LOGIT_LOSSES: dict[str, LossSpec] = {
    "kl": LossSpec("KL(p || q); for a regression head the same as mse", PROBLEM_TYPES, truncated=True),
    "reverse_kl": LossSpec("KL(q || p)", _CLASSES, truncated=True),
    "jsd": LossSpec("beta KL(p || m) + (1 - beta) KL(q || m)", _CLASSES, {"beta": Option(0.5, 0.0, 1.0)}, True),
    "total_variation": LossSpec("sum |p - q| / 2", _CLASSES, truncated=True),
    "soft_cross_entropy": LossSpec("- sum p log q", _CLASSES, truncated=True),
    "mse": LossSpec("mean (z_student - z_teacher)^2", PROBLEM_TYPES),
    "dkd": LossSpec(
        "alpha target KL + beta others' KL", (SINGLE_LABEL,), {"alpha": Option(1.0), "beta": Option(8.0)}
    ),
    "nlp_architect_mse": LossSpec("mean (log q - p)^2", (SINGLE_LABEL,)),
}

TERMS: dict[str, dict[str, LossSpec]] = {
    "labels": {"cross_entropy": LossSpec("cross entropy to the label", PROBLEM_TYPES)},
    "pseudo_labels": {
        "cross_entropy": LossSpec(
            "cross entropy to the teacher's prediction", PROBLEM_TYPES, {"threshold": Option(0.0, 0.0, 1.0)}
        )
    },
    "logits": LOGIT_LOSSES,
}


@dataclass(frozen=True)
class Term:
    """One summand of the objective: `weight` times the sum over its valid rows, over their number.

    name: "labels", "pseudo_labels" or "logits". loss: one of TERMS[name]; empty takes the first of them
    ("kl" for logits). temperature: None means the run's. options: the loss's own, and `standardize` (bool)
    for any logits loss: z-scores over the classes first; `tail` for those that truncated logits allow: "bucket",
    "renormalize" or "ignore" (sparse.py). What is left out takes its default; a tail that is the default is
    left out. Raises ConfigError.
    """

    name: str
    loss: str = ""
    weight: float = 1.0
    temperature: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        family = _one_of("term", self.name, TERMS)
        loss = self.loss or next(iter(family))
        spec = _one_of(f"{self.name} loss", loss, family)
        _number("weight", self.weight, low=0.0)
        if self.temperature is not None and _number("temperature", self.temperature, low=0.0) == 0:
            raise ConfigError("temperature must be above 0, not 0; leave it out to use the run's")
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "options", _complete(self.name, loss, spec, self.options))


def parse_loss(text: str) -> Term:
    """`"jsd:beta=0.5,temperature=2"` as a logits Term: a loss of LOGIT_LOSSES, then name=value after a colon.

    Besides the loss's own options: `temperature`, `weight`, `standardize` (alone, or =true / =false), and
    `tail=bucket|renormalize|ignore`.
    Hyphens in names are read as underscores. Raises ConfigError.
    """
    loss, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        name = name.replace("-", "_")
        if name in settings:
            raise ConfigError(f"loss {text!r}: {name} is given twice; give it once")
        settings[name] = _value(name, value if equals else None)
    own = {name: settings.pop(name) for name in ("temperature", "weight") if name in settings}
    if not loss:
        raise ConfigError(f"loss {text!r} names no loss; choose from {_names(LOGIT_LOSSES)}")
    return Term("logits", loss.strip().replace("-", "_"), options=settings, **own)


def mixture(alpha: float, term: Term) -> tuple[Term, ...]:
    """Labels weighing 1 - alpha and `term` weighing alpha; what weighs 0 is left out. Raises ConfigError."""
    _number("alpha", alpha, low=0.0, high=1.0)
    both = (Term("labels", weight=1.0 - alpha), replace(term, weight=float(alpha)))
    return tuple(each for each in both if each.weight > 0)


def check_term(term: Term, problem_type: str, num_labels: int) -> None:
    """Raise ConfigError where this term cannot teach a head of `problem_type` with `num_labels` outputs."""
    _one_of("problem type", problem_type, PROBLEM_TYPES)
    family = TERMS[term.name]
    if problem_type not in family[term.loss].heads:
        fitting = {name: spec for name, spec in family.items() if problem_type in spec.heads}
        raise ConfigError(
            f"loss {term.loss} is not defined for a {problem_type} head; choose from {_names(fitting)}"
        )
    if term.options.get("standardize") and (problem_type != SINGLE_LABEL or num_labels < 3):
        raise ConfigError(
            f"standardize needs a {SINGLE_LABEL} head of 3 classes or more, not {problem_type} "
            f"with {num_labels}: a standardised pair is always ±0.71 and teaches nothing; leave it out"
        )
    check_dense(term)
    if term.options.get("threshold") and problem_type == REGRESSION:
        raise ConfigError("threshold needs a confidence, which a regression head has not; leave it out")


def check_dense(term: Term) -> None:
    """Raise ConfigError where this term asks for what only truncated logits of a teacher have."""
    if "tail" in term.options:
        raise ConfigError(f"tail={term.options['tail']} is for truncated logits; these are whole: leave it out")


def check_truncated(term: Term) -> None:
    """Raise ConfigError where this term cannot be computed from truncated logits of a teacher."""
    if not TERMS[term.name][term.loss].truncated:
        fitting = [loss for loss, spec in TERMS[term.name].items() if spec.truncated]
        instead = f"choose from {_names(fitting)}" if fitting else "leave it out"
        raise ConfigError(f"loss {term.loss} needs every logit of the teacher, and only some were kept; {instead}")
    if term.options.get("standardize"):
        raise ConfigError("standardize needs every logit of the teacher, and only some were kept; leave it out")


def tutorial(temperature: float | None = None, alpha: float | None = None) -> tuple[Term, ...]:
    """The `DistillationLoss` of "Model Distillation: Creating Efficient Student Models" (M. J. Peña, 2023).

    alpha T^2 KL + (1 - alpha) CE, with T 4 and alpha 0.7 as its training loop sets them (the class's own
    default alpha is 0.5). No known defect.
    """
    temperature, alpha = 4.0 if temperature is None else temperature, 0.7 if alpha is None else alpha
    return mixture(alpha, Term("logits", "kl", temperature=temperature))


def nlp_architect(temperature: float | None = None, alpha: float | None = None) -> tuple[Term, ...]:
    """`TeacherStudentDistill` of IntelLabs/nlp-architect, its constructor's defaults: CE + 0.1 T^2 KL, T 1.

    The two weights are free; a given alpha makes them 1 - alpha and alpha. Mended: its `mse`, which is the
    command line's default, compares the student's log-probabilities with the teacher's probabilities (still
    to be had as `nlp_architect_mse`); an unknown loss name falls back to KL in silence; and for token logits
    padding enters the sum, which is divided by rows alone.
    """
    term = Term("logits", "kl", weight=0.1, temperature=1.0 if temperature is None else temperature)
    return (Term("labels"), term) if alpha is None else mixture(alpha, term)


PRESETS: dict[str, Callable[..., tuple[Term, ...]]] = {"tutorial": tutorial, "nlp-architect": nlp_architect}


def _complete(name: str, loss: str, spec: LossSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options checked, the others at their defaults."""
    own = ["standardize"] * (name == "logits") + ["tail"] * spec.truncated
    allowed = [*spec.options, *own]
    for option in given:
        if option not in allowed:
            choice = f"its options are {_names(allowed)}" if allowed else "it has none"
            raise ConfigError(f"{loss} has no option {option!r}; {choice}")
    values: dict[str, Any] = {
        option: _number(f"{loss} {option}", given.get(option, limit.default), limit.low, limit.high)
        for option, limit in spec.options.items()
    }
    if "standardize" in allowed:
        values["standardize"] = given.get("standardize", False)
        if not isinstance(values["standardize"], bool):
            raise ConfigError(f"standardize must be true or false, not {values['standardize']!r}")
    if _one_of("tail", given.get("tail", TAILS[0]), TAILS) != TAILS[0]:
        values["tail"] = given["tail"]
    return values


def _value(name: str, text: str | None) -> float | bool | str:
    """A number, or true / false; a name standing alone is true. A tail is a word."""
    if name == "tail":
        return (text or "").lower()
    words = {None: True, "true": True, "false": False}
    key = text.lower() if text else text
    if key in words:
        return words[key]
    try:
        return float(text or "")
    except ValueError:
        raise ConfigError(f"{name} must be a number, true or false, not {text!r}") from None


def _number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    span = f"between {low:g} and {high:g}" if math.isfinite(high) else f"{low:g} or more"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number {span}, not {value!r}")
    if not (low <= value <= high and math.isfinite(value)):
        raise ConfigError(f"{name} must be {span}, not {value:g}")
    return float(value)


def _one_of(what: str, name: str, choices: Any) -> Any:
    if name not in choices:
        raise ConfigError(f"there is no {what} {name!r}; choose from {_names(choices)}")
    return choices[name] if isinstance(choices, Mapping) else name


def _names(choices: Any) -> str:
    return ", ".join(choices)
