"""What a run asks of its loss: terms, how they are written, and whether they suit what there is.

No torch here: settings and the command line import this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...store.errors import ConfigError
from .catalogue import INNER, LOGIT_LOSSES, MAP, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, TAILS, TERMS, LossSpec
from .options import Number, complete

_PLAIN = Number(1.0)


@dataclass(frozen=True)
class Term:
    """One summand of the objective: `weight` times the sum over its valid rows (or tokens), over their number.

    name: one of TERMS. loss: one of TERMS[name]; empty takes the first of them ("kl" for logits).
    temperature: of a logits term; None means the run's. options: the loss's own; what is left out takes its default,
    and a tail that is the default is left out. Raises ConfigError.
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
        _PLAIN.check("weight", self.weight)
        if self.temperature is not None:
            if self.name in INNER:
                raise ConfigError(f"temperature is for logits, not for {self.name}; leave it out")
            if _PLAIN.check("temperature", self.temperature) == 0:
                raise ConfigError("temperature must be above 0, not 0; leave it out to use the run's")
        values = complete(loss, spec.options, self.options)
        if values.get("tail") == TAILS[0]:
            del values["tail"]
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "options", values)

    @property
    def spec(self) -> LossSpec:
        return TERMS[self.name][self.loss]


def parse_losses(text: str) -> tuple[Term, ...]:
    """`"kl hidden_states:weight=10 attentions/kl"`: terms between spaces, a + between them or not."""
    joined = re.sub(r"\s*([:,=/])\s*", r"\1", text.strip())
    return tuple(parse_loss(part) for part in joined.split() if part != "+") or (parse_loss(text),)


def parse_loss(text: str) -> Term:
    """`"jsd:beta=0.5,temperature=2"`: a loss of LOGIT_LOSSES, or a family of INNER_LOSSES with or without one of its
    losses (`hidden_states/cosine:layers=last`); then name=value after a colon.

    Besides the loss's own options: `weight`, and `temperature` of logits. A name alone is a yes: `kl:standardize`.
    Hyphens in names are read as underscores. Raises ConfigError.
    """
    name, _, rest = text.strip().partition(":")
    name = name.strip().replace("-", "_")
    if not name:
        raise ConfigError(f"loss {text!r} names no loss; choose from {_names([*LOGIT_LOSSES, *INNER])}")
    family, _, loss = name.partition("/") if name.partition("/")[0] in INNER else ("logits", "", name)
    if family == "logits":
        _one_of("loss", loss, [*LOGIT_LOSSES, *INNER])
    spec = _one_of(f"{family} loss", loss or next(iter(TERMS[family])), TERMS[family])
    settings: dict[str, Any] = {}
    for item in _items(rest):
        option, equals, value = (part.strip() for part in item.partition("="))
        option = option.replace("-", "_")
        if option in settings:
            raise ConfigError(f"loss {text!r}: {option} is given twice; give it once")
        known = {"weight": _PLAIN, "temperature": _PLAIN, **spec.options}.get(option)
        settings[option] = known.read(option, value if equals else None) if known else value
    own = {name: settings.pop(name) for name in ("temperature", "weight") if name in settings}
    return Term(family, loss, options=settings, **own)


def mixture(alpha: float, *terms: Term) -> tuple[Term, ...]:
    """Labels weighing 1 - alpha, and `terms` each weighing alpha times its own weight; what weighs 0 is left out.

    Raises ConfigError.
    """
    Number(0.5, 0.0, 1.0).check("alpha", alpha)
    taught = (replace(term, weight=float(alpha) * term.weight) for term in terms)
    return tuple(term for term in (Term("labels", weight=1.0 - alpha), *taught) if term.weight > 0)


def mapped(terms: Sequence[Term], layers: str | None) -> tuple[Term, ...]:
    """The terms with `layers` for those that have layers. Raises ConfigError where none has."""
    if layers is None:
        return tuple(terms)
    if not any("layers" in term.options for term in terms):
        raise ConfigError(f"--layer-map {layers}: no term of this loss has layers; leave it out")
    return tuple(
        replace(term, options={**term.options, "layers": layers}) if "layers" in term.options else term
        for term in terms
    )


def check_term(term: Term, problem_type: str, num_labels: int) -> None:
    """Raise ConfigError where this term cannot teach a head of `problem_type` with `num_labels` outputs."""
    _one_of("problem type", problem_type, PROBLEM_TYPES)
    if problem_type not in term.spec.heads:
        fitting = {name: spec for name, spec in TERMS[term.name].items() if problem_type in spec.heads}
        raise ConfigError(f"loss {term.loss} is not defined for a {problem_type} head; choose from {_names(fitting)}")
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
    if not term.spec.truncated:
        fitting = [loss for loss, spec in TERMS[term.name].items() if spec.truncated]
        instead = f"choose from {_names(fitting)}" if fitting else "leave it out"
        raise ConfigError(f"loss {term.loss} needs every logit of the teacher, and only some were kept; {instead}")
    if term.options.get("standardize"):
        raise ConfigError("standardize needs every logit of the teacher, and only some were kept; leave it out")


def _items(rest: str) -> list[str]:
    """Options between commas; the commas of an explicit map, as layers=0:0,1:2, do not part it."""
    items: list[str] = []
    for part in filter(None, (part.strip() for part in rest.split(","))):
        if items and MAP.fullmatch(part):
            items[-1] += f",{part}"
        else:
            items.append(part)
    return items


def _one_of(what: str, name: str, choices: Any) -> Any:
    if name not in choices:
        raise ConfigError(f"there is no {what} {name!r}; choose from {_names(choices)}")
    return choices[name] if isinstance(choices, Mapping) else name


def _names(choices: Any) -> str:
    return ", ".join(choices)
