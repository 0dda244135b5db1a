"""Settings of `predistill train` for several stores. Nothing heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from ...store.errors import ConfigError

SEVERAL = ("auto", "ensemble", "concatenate")
AVERAGES = ("probabilities", "logits")
WEIGHTS = ("equal", "learned", "confidence")


@dataclass
class EnsembleSettings:
    """How several stores are read together. Raises ConfigError."""

    several_stores: str = field(
        default="auto",
        metadata={
            "help": "Several stores of the same rows are an ensemble, whose teachers are averaged; stores without a "
            "row in common are read one after another (concatenate); auto looks, and says which.",
            "choices": SEVERAL,
        },
    )
    ensemble_average: str = field(
        default="probabilities",
        metadata={"help": "What is averaged of an ensemble's teachers.", "choices": AVERAGES},
    )
    ensemble_weights: str = field(
        default="equal",
        metadata={
            "help": "How much each teacher of an ensemble weighs: equal; numbers in the order of the stores, as "
            "0.5,0.3,0.2; learned, on --ensemble-split; confidence, row by row, more for the surer."
        },
    )
    ensemble_split: str | None = field(
        default=None,
        metadata={"help": "Labelled split that --ensemble-weights learned looks at. Default: validation."},
    )

    def check_ensemble_values(self) -> None:
        """What needs no look at the stores."""
        for name, value, allowed in (
            ("several-stores", self.several_stores, SEVERAL),
            ("ensemble-average", self.ensemble_average, AVERAGES),
        ):
            if value not in allowed:
                raise ConfigError(f"--{name} is one of {', '.join(allowed)}; got {value!r}")
        if isinstance(self.ensemble_weights, list | tuple):
            self.ensemble_weights = ",".join(map(str, self.ensemble_weights))
        self.given_weights()
        if self.ensemble_split is not None and self.ensemble_weights != "learned":
            raise ConfigError("--ensemble-split is for --ensemble-weights learned; give both")

    def check_ensemble(self, stores: int, merged: str | None = None) -> None:
        """stores: how many there are, each teacher of an ensemble store being one; merged: the first such store."""
        given = self.given_weights()
        if merged and self.several_stores != "auto":
            raise ConfigError(f"--several-stores has no part in {merged}, an ensemble store: leave it away")
        if stores < 2 or self.several_stores == "concatenate":
            self.refuse_ensemble("one store" if stores < 2 else "--several-stores concatenate")
        elif given and len(given) != stores:
            raise ConfigError(f"--ensemble-weights: a number for each of {stores} stores expected; got {len(given)}")

    def refuse_ensemble(self, instead: str) -> None:
        """Raises ConfigError where something is set that only an ensemble has."""
        for one in fields(EnsembleSettings):
            value = getattr(self, one.name)
            if value != one.default and not (one.name == "several_stores" and value == "concatenate"):
                flag = "--" + one.name.replace("_", "-")
                raise ConfigError(f"{flag} is for an ensemble of several stores; this is {instead}: leave it away")

    def given_weights(self) -> tuple[float, ...]:
        """Numbers, if numbers were given."""
        if self.ensemble_weights in WEIGHTS:
            return ()
        try:
            found = tuple(float(part) for part in self.ensemble_weights.split(","))
        except ValueError:
            found = ()
        if not found or min(found) < 0 or not math.isfinite(sum(found)) or not sum(found):
            raise ConfigError(
                f"--ensemble-weights is one of {', '.join(WEIGHTS)}, or numbers from 0 on for each store, as "
                f"0.5,0.3,0.2; got {self.ensemble_weights!r}"
            )
        return found
