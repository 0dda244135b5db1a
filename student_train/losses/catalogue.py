"""Every loss that a run may ask for: its formula, the heads it suits, its options.

No torch here: settings and the command line read this file. Logits losses are computed by `rows.LOGIT_FUNCTIONS`,
losses of what is inside the models by `student_train/inside/`, under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .options import Flag, Number, Option, Text, Whole, Word

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)


@dataclass(frozen=True)
class LossSpec:
    """One loss: its formula, the heads (transformers' `problem_type`) it is defined for, its options.

    truncated: is it defined where the teacher's distribution is known at some classes only (sparse.py)?
    unit: what it has a value for, and is averaged over: "row", "token" or "pair" (of a query and a key).
    """

    formula: str
    heads: tuple[str, ...] = PROBLEM_TYPES
    options: Mapping[str, Option] = field(default_factory=dict)
    truncated: bool = False
    unit: str = "row"


TAILS = ("bucket", "renormalize", "ignore")  # what becomes of the classes that were not kept: see sparse.py

_CLASSES = (SINGLE_LABEL, MULTI_LABEL)
_STANDARDIZE: dict[str, Option] = {"standardize": Flag()}
_KEPT: dict[str, Option] = {**_STANDARDIZE, "tail": Word(TAILS[0], TAILS)}

# p teacher, q student, both at temperature T; z logits. Every one is times T^2.
LOGIT_LOSSES: dict[str, LossSpec] = {
    "kl": LossSpec("KL(p || q); for a regression head the same as mse", PROBLEM_TYPES, _KEPT, truncated=True),
    "reverse_kl": LossSpec("KL(q || p)", _CLASSES, _KEPT, truncated=True),
    "jsd": LossSpec(
        "beta KL(p || m) + (1 - beta) KL(q || m)", _CLASSES, {"beta": Number(0.5, 0.0, 1.0), **_KEPT}, truncated=True
    ),
    "total_variation": LossSpec("sum |p - q| / 2", _CLASSES, _KEPT, truncated=True),
    "soft_cross_entropy": LossSpec("- sum p log q", _CLASSES, _KEPT, truncated=True),
    "mse": LossSpec("mean (z_student - z_teacher)^2", PROBLEM_TYPES, _STANDARDIZE),
    "dkd": LossSpec(
        "alpha target KL + beta others' KL",
        (SINGLE_LABEL,),
        {"alpha": Number(1.0), "beta": Number(8.0), **_STANDARDIZE},
    ),
    "nlp_architect_mse": LossSpec("mean (log q - p)^2", (SINGLE_LABEL,), _STANDARDIZE),
}

MAP = re.compile(r"\d+:\d+(,\d+:\d+)*")
LAYER_MAPS = ("uniform", "last", "tutorial")
_LAYERS = Word(
    "uniform", LAYER_MAPS, re.compile(rf"every-[1-9]\d*|{MAP.pattern}").fullmatch, ", every-2 and the like, or 0:0,1:2"
)
_OVER: dict[str, Option] = {"layers": _LAYERS, "over_layers": Word("mean", ("mean", "sum"))}
_PROJECTED: dict[str, Option] = {
    "projection": Word("auto", ("auto", "linear", "orthogonal", "none")), "bias": Flag(),
}  # fmt: skip
_HIDDEN: dict[str, Option] = {**_OVER, **_PROJECTED}
_HEADS: dict[str, Option] = {
    **_OVER, "heads": Word("auto", ("auto", "mean", "repeat", "sum"), MAP.fullmatch, ", or a map as 0:0,1:3"),
}  # fmt: skip
_PAIRS = re.compile(r"[qkv]{2}(\+[qkv]{2})*").fullmatch
_LAST: dict[str, Option] = {**_OVER, "layers": replace(_LAYERS, default="last")}
_VECTORS: dict[str, Option] = {**_LAST, "feature": Word("mean", ("mean", "first", "pooled"))}

_MODULE_PAIRS = re.compile(r"[^:+,\s]+:[^:+,\s]+(\+[^:+,\s]+:[^:+,\s]+)*").fullmatch
_MODULES: dict[str, Option] = {
    "modules": Text("", _MODULE_PAIRS, "names of modules, student:teacher, as stage2:layer3 or a:b+c:d")
}

# h hidden states, A attention probabilities, a scores before softmax; see hidden.py, attention.py, relations.py
INNER_LOSSES: dict[str, dict[str, LossSpec]] = {
    "hidden_states": {
        "mse": LossSpec("mean (h_student - h_teacher)^2", options=_HIDDEN, unit="token"),
        "cosine": LossSpec("1 - cos(h_student, h_teacher)", options=_HIDDEN, unit="token"),
        "pkd": LossSpec("|h_student / |h_student| - h_teacher / |h_teacher||^2 of the first token", options=_HIDDEN),
    },
    "embeddings": {
        "mse": LossSpec("mean (h_student - h_teacher)^2 of layer 0", options=_PROJECTED, unit="token"),
        "cosine": LossSpec("1 - cos(h_student, h_teacher) of layer 0", options=_PROJECTED, unit="token"),
    },
    "attentions": {
        "mse": LossSpec("mean over heads (A_student - A_teacher)^2", options=_HEADS, unit="pair"),
        "kl": LossSpec("mean over heads KL(A_teacher || A_student)", options=_HEADS, unit="token"),
    },
    "attention_scores": {
        "mse": LossSpec(
            "mean over heads (a_student - a_teacher)^2", options={**_HEADS, "or_attentions": Flag()}, unit="pair"
        ),
        "soft_cross_entropy": LossSpec(
            "mean over heads - sum softmax(a_teacher) log softmax(a_student)", options=_HEADS, unit="token"
        ),
    },
    "relations": {
        "minilm": LossSpec(
            "KL between the relations softmax(m n^T / sqrt(d)) of queries, keys and values",
            options={**_LAST, "relation_heads": Whole(0, 0), "pairs": Word("qq+kk+vv", ("qq+kk+vv",), _PAIRS)},
        ),
        "rkd": LossSpec("25 distance + 50 angle", options=_VECTORS),
        "rkd_distance": LossSpec("Huber of distances between rows", options=_VECTORS),
        "rkd_angle": LossSpec("Huber of angles between triples of rows", options=_VECTORS),
        "similarity": LossSpec("rows of the Gram matrix of a batch, of unit length", options=_VECTORS),
        "pkt": LossSpec("KL of cosine similarities within a batch", options=_VECTORS),
        "attention_transfer": LossSpec("unit maps of mean |h|^2 over tokens", options=_OVER),
        "nst": LossSpec("maximum mean discrepancy between the units' maps over tokens", options=_OVER),
        "fsp": LossSpec("mean (G_student - G_teacher)^2, G = h_i^T h_j / S of two layers", options=_HIDDEN),
        "mmd": LossSpec("mean (h_i h_j^T / D)^2 differences of two layers", options=_HIDDEN, unit="pair"),
    },
    "feature_maps": {
        "mse": LossSpec(
            "mean (f_student - f_teacher)^2 of modules' outputs", options={**_MODULES, **_PROJECTED}, unit="token"
        ),
        "cosine": LossSpec("1 - cos(f_student, f_teacher)", options={**_MODULES, **_PROJECTED}, unit="token"),
        "attention_transfer": LossSpec("unit maps of mean |f|^2 over channels", options=_MODULES),
        "nst": LossSpec("maximum mean discrepancy between the channels' maps", options=_MODULES),
        "rkd": LossSpec("25 distance + 50 angle, of means over positions", options=_MODULES),
        "similarity": LossSpec("rows of the Gram matrix of a batch's means over positions", options=_MODULES),
        "pkt": LossSpec("KL of cosine similarities of means over positions", options=_MODULES),
    },
}
INNER = tuple(INNER_LOSSES)

TERMS: dict[str, dict[str, LossSpec]] = {
    "labels": {"cross_entropy": LossSpec("cross entropy to the label")},
    "pseudo_labels": {
        "cross_entropy": LossSpec(
            "cross entropy to the teacher's prediction", options={"threshold": Number(0.0, 0.0, 1.0)}
        )
    },
    "logits": LOGIT_LOSSES,
    **INNER_LOSSES,
}
