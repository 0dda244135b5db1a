"""Loss terms: pure functions of tensors, one value a row.

Letters: B rows, S tokens, C classes, T temperature; `[...]` any leading shape ([B], or [B, S]).
Nothing here reduces over rows: whoever calls masks, sums, and divides by its own denominator. Half-precision
logits are computed in float32, float64 stays float64. The teacher is a constant: no gradient reaches it.

catalogue.py every loss, its formula, heads and options; imports no torch, nor do the next three
    TERMS: dict[term name, dict[loss name, LossSpec]]; LOGIT_LOSSES, INNER_LOSSES
options.py   kinds of options: Number, Whole, Flag, Word
terms.py     a run's terms
    Term(name, loss="", weight=1.0, temperature=None, options={})  name: one of TERMS
    parse_loss("jsd:beta=0.5,temperature=2") -> Term; parse_losses("kl hidden_states/cosine:layers=last") -> terms
    mixture(alpha, *terms) -> (labels term of weight 1 - alpha, the others times alpha)
    mapped(terms, layers) -> terms with this layer map
    check_term(term, problem_type, num_labels) -> None, or ConfigError
    check_dense(term), check_truncated(term)      can it be computed from all, from some of the teacher's logits?
presets.py   PRESETS: dict[str, (temperature=None, alpha=None) -> tuple[Stage, ...]]     None = as published
rows.py      a Term meets its function
    row_loss(term, student_logits, teacher_logits=None, labels=None, *,
             problem_type="single_label_classification", temperature=1.0) -> (loss [...], valid bool [...]);
             temperature is used where term.temperature is None
    LOGIT_FUNCTIONS: dict[problem_type, dict[loss name, function]]
logits.py    f(student_logits [..., C], teacher_logits [..., C], *, temperature=1.0) -> [...], T^2 applied
    kl_divergence, reverse_kl_divergence, generalized_jsd(beta=0.5), total_variation, soft_cross_entropy, mse,
    nlp_architect_mse, dkd(labels=None, alpha=1.0, beta=8.0); standardize_logits(logits) -> logits
divergences.py   the formulas: f(log_q [..., C], log_p [..., C]) -> [...]
binary.py    the same for multi-label heads, each class a Bernoulli, mean over classes
    binary_kl_divergence, binary_reverse_kl_divergence, binary_generalized_jsd(beta=0.5),
    binary_total_variation, binary_soft_cross_entropy
labels.py
    label_loss(logits [..., C], labels, problem_type) -> (loss [...], valid bool [...])
    pseudo_label_loss(student_logits, teacher_logits, problem_type, *, threshold=0.0, labels=None) -> the same
sparse.py    N token positions, V vocabulary, K entries kept of the teacher
    SparseTargets(indices int64 [N, K], logprobs [N, K], tail_logprob [N])
    top_k_targets(logits, logsumexp, indices, *, temperature=1.0, logsumexp_at=None, vocabulary) -> SparseTargets
    sample_targets(indices, counts, draws, ratios=None) -> SparseTargets
    sparse_loss(term, student_logits [N, V], targets, *, temperature=1.0) -> [N], T^2 applied
fused.py     head and losses together, no logits [N, V] (chunk.py: a chunk's losses and gradient)
    TokenTerm(term, coefficient, mask, target)
    fused_linear_loss(hidden [N, D], weight [V, D], terms, *, bias=None, scale=1.0, softcap=None,
                      chunk_bytes=None, predictions=False) -> FusedLoss(loss, sums [terms], predictions [N] or None)

What is inside the models; these are called by their module's name, as hidden.mse. D width, H heads; mask [B, S] is
true at tokens, visible [B, 1, S, S] where a query sees a key; [B, S, S] are pairs of a query and a key
hidden.py     mse, cosine(student [B, S, D], teacher [B, S, D], mask) -> [B, S]; pkd -> [B]
attention.py  mse(student [B, H, S, S], teacher, visible, *, heads) -> [B, S, S]; kl, soft_cross_entropy -> [B, S]
relations.py  minilm(student_left, student_right, teacher_left, teacher_right, mask, *, heads) -> [B]; between rows of a
    batch rkd, rkd_distance, rkd_angle, similarity, pkt, cc, hard_dark_rank, dist -> [B]; mmd -> [B, S, S]
feature_maps.py   attention_transfer, nst, fsp, vid of [B, C, H, W] or [B, S, D] -> [B]

A further loss of a family is a function in its file and a line in the catalogue; see docs/losses.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "catalogue": ("INNER_LOSSES", "LOGIT_LOSSES", "TERMS", "LossSpec"),
    "terms": (
        "Term",
        "check_dense",
        "check_term",
        "check_truncated",
        "mapped",
        "mixture",
        "parse_loss",
        "parse_losses",
    ),
    "presets": ("PRESETS", "Stage"),
    "rows": ("LOGIT_FUNCTIONS", "row_loss"),
    "labels": ("label_loss", "pseudo_label_loss"),
    "logits": (
        "dkd",
        "generalized_jsd",
        "kl_divergence",
        "mse",
        "nlp_architect_mse",
        "reverse_kl_divergence",
        "soft_cross_entropy",
        "standardize_logits",
        "total_variation",
    ),
    "sparse": ("SparseTargets", "sample_targets", "sparse_loss", "top_k_targets"),
    "fused": ("FusedLoss", "TokenTerm", "fused_linear_loss"),
    "binary": (
        "binary_generalized_jsd",
        "binary_kl_divergence",
        "binary_reverse_kl_divergence",
        "binary_soft_cross_entropy",
        "binary_total_variation",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Load a name from its module at first use: settings import `losses.terms` without torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
