"""Published recipes: named lists of terms, in one stage or in several that follow each other.

Each takes `temperature` and `alpha` (None: as published) and gives its stages. What an original does wrong is mended
here, and the docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .terms import Term, mixture


@dataclass(frozen=True)
class Stage:
    """Terms that are trained on together.

    arguments: fields of TrainingArguments as published; those of the run beat them, and those `given` for this stage
    alone beat both.
    """

    name: str
    terms: tuple[Term, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)


def tutorial(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """The `DistillationLoss` of "Model Distillation: Creating Efficient Student Models" (M. J. Peña, 2023).

    alpha T^2 KL + (1 - alpha) CE, with T 4 and alpha 0.7 as its training loop sets them (the class's own
    default alpha is 0.5). No known defect.
    """
    return (Stage("distillation", mixture(_or(alpha, 0.7), _kl(_or(temperature, 4.0)))),)


def tutorial_layers(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """The tutorial's layer distillation beside its `DistillationLoss`: sum over pairs of layers of MSE, weight 1.

    The tutorial trains on the layers alone and leaves open how both are joined. Mended: padding enters its means; its
    projections are not handed to the optimiser.
    """
    return _with_tutorial(temperature, alpha, Term("hidden_states", "mse", options=_TUTORIAL_SUM))


def tutorial_attention(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """The tutorial's attention loss beside its `DistillationLoss`: mean over pairs of layers of MSE, weight 1.

    Where head counts differ, every student head is held to the mean over the teacher's. Mended: padding enters.
    """
    options = {"layers": "tutorial", "heads": "repeat"}
    return _with_tutorial(temperature, alpha, Term("attentions", "mse", options=options))


def tutorial_tinybert(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """The tutorial's `tinybert_distillation`, whole: embeddings + hidden states + attentions + T^2 KL at T 4.

    MSE summed over pairs of layers, no labels unless an alpha asks for them. Mended: padding enters; it cannot run
    where widths differ (here: projections). Kept: it pairs the student's hidden state i with the teacher's 2i - 1, so
    the last one of a teacher of even depth is never learnt from.
    """
    terms = (
        Term("hidden_states", "mse", options=_TUTORIAL_SUM),  # the first pair, 0:0, is the embeddings
        Term("attentions", "mse", options=_TUTORIAL_SUM),
        _kl(_or(temperature, 4.0)),
    )
    return (Stage("distillation", mixture(_or(alpha, 1.0), *terms)),)


def nlp_architect(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """`TeacherStudentDistill` of IntelLabs/nlp-architect, its constructor's defaults: CE + 0.1 T^2 KL, T 1.

    The two weights are free; a given alpha makes them 1 - alpha and alpha. Mended: its `mse`, which is the
    command line's default, compares the student's log-probabilities with the teacher's probabilities (still
    to be had as `nlp_architect_mse`); an unknown loss name falls back to KL in silence; and for token logits
    padding enters the sum, which is divided by rows alone.
    """
    temperature = _or(temperature, 1.0)
    apart = (Term("labels"), Term("logits", "kl", weight=0.1, temperature=temperature))
    return (Stage("distillation", apart if alpha is None else mixture(alpha, _kl(temperature))),)


def haystack(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """Haystack v1's `distil_intermediate_layers_from`, then its `distil_prediction_layer_from`.

    First the MSE of hidden states and of attention probabilities, summed over TinyBERT's pairs of layers; then
    alpha T^2 KL + (1 - alpha) labels, T 1 and alpha 0.5; 5 epochs at 5e-5 and 2 at 3e-5 in batches of 10, as its
    arguments default to. Mended: every hidden state went through the last layer's projection, the others were
    never trained; padding entered all means, and the softmax over a row's tokens; its `mse` could not be called. Its KL
    adds start and end of an answer, whose mean is taken here, as of their labels.
    """
    inner = (Term("hidden_states", "mse", options=_SUM), Term("attentions", "mse", options=_SUM))
    last = mixture(_or(alpha, 0.5), _kl(_or(temperature, 1.0)))
    shared = {"per_device_train_batch_size": 10, "warmup_steps": 0.2}
    return (
        Stage("intermediate", inner, {**shared, "num_train_epochs": 5, "learning_rate": 5e-5}),
        Stage("prediction", last, {**shared, "num_train_epochs": 2, "learning_rate": 3e-5}),
    )


def tinybert(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """Task-specific distillation of TinyBERT (Jiao et al. 2020, arXiv:1909.10351): inner layers, then predictions.

    First the MSE of hidden states, embeddings among them, and of attention scores, summed over pairs of layers, 20
    epochs at 5e-5 in batches of 32; then soft cross entropy at T 1, 3 epochs at 3e-5. No labels unless an alpha asks
    for them. Where a store holds attention probabilities and no scores, these are compared, as Haystack does. Mended:
    padded queries entered the mean over attention, and the last loss was divided by the number of classes too. Each
    pair of layers has its own projection, where the original's code shares one.
    """
    inner = (
        Term("hidden_states", "mse", options={**_SUM, "bias": True}),
        Term("attention_scores", "mse", options={**_SUM, "or_attentions": True}),
    )
    last = mixture(_or(alpha, 1.0), Term("logits", "soft_cross_entropy", temperature=_or(temperature, 1.0)))
    shared = {"per_device_train_batch_size": 32}
    return (
        Stage("intermediate", inner, {**shared, "num_train_epochs": 20, "learning_rate": 5e-5}),
        Stage("prediction", last, {**shared, "num_train_epochs": 3, "learning_rate": 3e-5}),
    )


def minilm(temperature: float | None = None, alpha: float | None = None) -> tuple[Stage, ...]:
    """MiniLMv2 (Wang et al. 2021, arXiv:2012.15828): relations of the last layer's q, k and v, then labels.

    As many relation heads as the teacher has heads, where --loss relations/minilm:relation_heads=48 takes the paper's
    number for base models. The paper distils without a task and then fine-tunes on labels; so the second stage is
    plain fine-tuning, unless an alpha or a temperature asks for the teacher's logits too. No known defect.
    """
    taught = alpha is not None or temperature is not None
    last = mixture(_or(alpha, 0.7), _kl(_or(temperature, 2.0))) if taught else (Term("labels"),)
    return (Stage("relations", (Term("relations", "minilm"),)), Stage("fine-tuning", last))


PRESETS: dict[str, Callable[..., tuple[Stage, ...]]] = {
    "tutorial": tutorial,
    "tutorial-layers": tutorial_layers,
    "tutorial-attention": tutorial_attention,
    "tutorial-tinybert": tutorial_tinybert,
    "nlp-architect": nlp_architect,
    "haystack": haystack,
    "tinybert": tinybert,
    "minilm": minilm,
}

_SUM = {"over_layers": "sum"}
_TUTORIAL_SUM = {**_SUM, "layers": "tutorial"}


def _kl(temperature: float) -> Term:
    return Term("logits", "kl", temperature=temperature)


def _with_tutorial(temperature: float | None, alpha: float | None, term: Term) -> tuple[Stage, ...]:
    (stage,) = tutorial(temperature, alpha)
    return (Stage("distillation", (*stage.terms, term)),)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
