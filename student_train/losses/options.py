"""What a loss lets be chosen: a number, a word, a yes or no, or a text that is read where it is used.

Each kind reads itself from the command line and checks itself; no torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...store.errors import ConfigError


class Option(Protocol):
    """One choice of a loss."""

    @property
    def default(self) -> Any: ...

    def read(self, name: str, text: str | None) -> Any:
        """The value that `text` stands for; None where the name stood alone. Raises ConfigError."""

    def check(self, name: str, value: Any) -> Any:
        """The value, in its own type. Raises ConfigError for one that is not allowed."""


@dataclass(frozen=True)
class Number:
    """A real number; both ends of its range are allowed."""

    default: float
    low: float = 0.0
    high: float = math.inf

    def read(self, name: str, text: str | None) -> Any:
        words = {None: True, "true": True, "false": False}  # refused by check, which says what is expected
        key = text.lower() if text else text
        if key in words:
            return words[key]
        try:
            return float(text or "")
        except ValueError:
            raise ConfigError(f"{name} must be a number, not {text!r}") from None

    def check(self, name: str, value: Any) -> float:
        span = f"between {self.low:g} and {self.high:g}" if math.isfinite(self.high) else f"{self.low:g} or more"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number {span}, not {value!r}")
        if not (self.low <= value <= self.high and math.isfinite(value)):
            raise ConfigError(f"{name} must be {span}, not {value:g}")
        return float(value)


@dataclass(frozen=True)
class Whole:
    """A whole number from `low`."""

    default: int
    low: int = 1

    def read(self, name: str, text: str | None) -> Any:
        return int(text) if text and text.isdecimal() else text

    def check(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < self.low:
            raise ConfigError(f"{name} must be a whole number from {self.low}, not {value!r}")
        return value


@dataclass(frozen=True)
class Flag:
    """Yes or no; its name alone is a yes."""

    default: bool = False

    def read(self, name: str, text: str | None) -> Any:
        return {None: True, "true": True, "false": False}.get(text.lower() if text else text, text)

    def check(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        return value


@dataclass(frozen=True)
class Word:
    """One of a few words; `also` decides of others (an explicit map, for one) and says in `hint` what they are."""

    default: str
    choices: tuple[str, ...]
    also: Callable[[str], Any] = lambda text: False
    hint: str = ""

    def read(self, name: str, text: str | None) -> Any:
        return (text or "").lower()

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not (value in self.choices or self.also(value)):
            raise ConfigError(f"there is no {name} {value!r}; choose from {', '.join(self.choices)}{self.hint}")
        return value


@dataclass(frozen=True)
class Text:
    """A text that is read where it is used; `valid` decides which may be, and `hint` says what they are."""

    default: str
    valid: Callable[[str], Any]
    hint: str

    def read(self, name: str, text: str | None) -> Any:
        return text or ""

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not (value == self.default or self.valid(value)):
            raise ConfigError(f"{name} must be {self.hint}, not {value!r}")
        return value


def complete(loss: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options checked, the others at their defaults. Raises ConfigError."""
    for name in given:
        if name not in options:
            choice = f"its options are {', '.join(options)}" if options else "it has none"
            raise ConfigError(f"{loss} has no option {name!r}; {choice}")
    return {name: option.check(f"{loss} {name}", given.get(name, option.default)) for name, option in options.items()}
