"""Write docs/parity.md from what the parity tests compute: `python docs/make_parity.py`. A test holds the page to them.

The recorded cases are found by PREDISTILL_ORACLES, as the tests find them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).with_name("parity.md")
sys.path.append(str(PAGE.parent.parent / "tests"))
cases = import_module("oracle_cases")

# kind: (our functions, what differs and why)
LOGITS = {
    "haystack_prediction_layer": (
        "logits.kl_divergence, logits.mse",
        "it takes the softmax over axis −2: over tokens for its [B, S, 2] span logits, padding included, and over the "
        "batch for plain [B, C]; ours over classes. Its `mse` cannot run as released (wrong keywords): what it meant "
        "is recorded",
    ),
    "tutorial_distillation_loss": ("logits.kl_divergence, labels.label_loss", "nothing"),
    "nlp_architect_distill_loss": (
        "logits.kl_divergence, logits.nlp_architect_mse",
        "divides by rows even where the sum is over tokens; its `mse` compares log-probabilities with probabilities: "
        "kept under its own name, `mse` compares logits",
    ),
    "nlp_architect_distill_loss_dict": (
        "logits.kl_divergence, logits.nlp_architect_mse",
        "several heads, mean of their losses; else as above",
    ),
    "torchdistill_kd_loss": (
        "logits.kl_divergence, labels.label_loss",
        "alpha weighs the labels; without labels or with alpha 0 no T²; softmax over axis 1, tokens for [B, S, V]",
    ),
    "torchdistill_logit_std_kd_loss": ("logits.standardize_logits, logits.kl_divergence", "as torchdistill_kd_loss"),
    "torchdistill_dist_loss": (
        "relations.dist",
        "nothing. Its second part compares classes over the batch, so it is one number for all rows",
    ),
    "textbrewer_kd_ce_loss": ("logits.soft_cross_entropy", "no T²; mean over all rows, padding included"),
    "textbrewer_kd_mse_loss": ("logits.mse", "divides logits by T and does not multiply by T²"),
    "trl_generalized_jsd": (
        "logits.generalized_jsd",
        "no T²; without labels it divides a sum over tokens by the rows alone",
    ),
    "mdistiller_kd_loss": ("logits.kl_divergence", "nothing"),
    "repdistiller_distill_kl": ("logits.kl_divergence", "nothing"),
    "lskd_kd_loss": ("logits.standardize_logits, logits.kl_divergence", "nothing"),
    "mdistiller_dkd_loss": (
        "logits.dkd",
        "takes 1000 from the target's logit and the log of summed probabilities, NaN in float32 once the target stands "
        "about 100 T apart; ours excludes it in log space",
    ),
    "lskd_dkd_loss": ("logits.standardize_logits, logits.dkd", "as mdistiller_dkd_loss"),
    "tinybert_prediction_layer": ("logits.soft_cross_entropy", "no T²; divides by rows × classes"),
}
SPARSE = {
    "distillkit_sparse_kl": (
        "sparse.sparse_loss",
        "raises the tail to another temperature as one lump, so that equal logits still cost; ours takes the tail's "
        "mass from a stored log-sum-exp. It computes in float32 whatever it is given",
    ),
    "distillkit_sparse_jsd": ("sparse.sparse_loss", "as distillkit_sparse_kl"),
    "distillkit_sparse_tvd": ("sparse.sparse_loss", "as distillkit_sparse_kl"),
    "distillkit_dense_kl": ("logits.kl_divergence", "nothing"),
}
HIDDEN = {
    "textbrewer_hid_mse_loss": ("hidden.mse", "nothing"),
    "textbrewer_cos_loss": ("hidden.cosine", "adds about 1e-12 to squared lengths"),
    "textbrewer_pkd_loss": (
        "hidden.pkd",
        "takes position 0, padding in rows padded on the left; ours the first token",
    ),
    "textbrewer_fsp_loss": ("feature_maps.fsp", "nothing"),
    "textbrewer_mmd_loss": (
        "relations.mmd",
        "divides by the width without a mask and by the padded length with one, so that padding enters; ours always "
        "by the width",
    ),
    "tutorial_layer_distillation_loss": ("hidden.mse", "no mask: padding enters its mean"),
    "tutorial_layer_distillation_step": ("hidden.mse", "no mask; sums over layers"),
    "tutorial_tinybert_distillation": (
        "hidden.mse, attention.mse, logits.kl_divergence",
        "no mask. Pairs student states 1, 2, … with the teacher's odd ones, so that an even teacher's last layer is "
        "never matched. T fixed at 4",
    ),
    "tinybert_intermediate": (
        "hidden.mse, attention.mse",
        "padded tokens enter the mean of states, padded queries and unseen keys its divisor for scores; one projection "
        "for all layers. Ours masks, and has one projection a pair",
    ),
    "haystack_tinybert_intermediate": (
        "hidden.mse, attention.mse",
        "no mask; all states go through the last attention layer's mapping (a loop variable left over), the others "
        "learn nothing. Ours masks, and has one projection a pair",
    ),
    "distillkit_hidden_state_loss": ("hidden.mse, hidden.cosine", "nothing"),
}
ATTENTION = {
    "textbrewer_att_mse_loss": (
        "attention.mse",
        "without a mask all entries up to −0.001 become 0, negative scores too; ours takes a mask",
    ),
    "textbrewer_att_mse_sum_loss": ("attention.mse", "as textbrewer_att_mse_loss, after the sum over heads"),
    "textbrewer_att_ce_loss": (
        "attention.soft_cross_entropy",
        "its softmax runs over all keys and drops masked ones without renormalising (without a mask: those the teacher "
        "scores up to −0.001); ours runs over visible keys",
    ),
    "textbrewer_att_ce_mean_loss": (
        "attention.soft_cross_entropy",
        "as textbrewer_att_ce_loss, of the heads' mean",
    ),
    "tutorial_attention_loss": ("attention.mse", "no mask: unseen keys and padded queries enter the divisor"),
}
RELATION = {
    "rkd_distance": (
        "relations.rkd_distance",
        "distances through e² + e² − 2ee, which costs float32 digits; ours from differences",
    ),
    "rkd_angle": ("relations.rkd_angle", "nothing"),
    "rkd_hard_dark_rank": (
        "relations.hard_dark_rank",
        "takes the nearest row for the row itself and drops it; ours drops the row itself",
    ),
    "repdistiller_rkd": ("relations.rkd", "nothing"),
    "repdistiller_similarity_preserving": ("relations.similarity", "nothing"),
    "torchdistill_spkd": (
        "relations.similarity",
        "divides Gram rows by their L1 length, where paper and RepDistiller take L2: norm=1",
    ),
    "repdistiller_pkt": ("relations.pkt", "nothing"),
    "repdistiller_cc": ("relations.cc", "compares neighbours in the batch only; kept as it is"),
    "repdistiller_attention_transfer": ("feature_maps.attention_transfer", "nothing"),
    "repdistiller_nst": ("feature_maps.nst", "nothing"),
    "repdistiller_fsp": ("feature_maps.fsp", "one loss a pair of layers; recorded is their sum"),
    "repdistiller_vid": ("feature_maps.vid", "nothing. The regressor before it is the caller's"),
    "minilmv2_relation_loss": (
        "relations.minilm",
        "uses the mask's row sums only, so rows must be padded on the right; ours on either side",
    ),
}
FAMILIES = {"logits": LOGITS, "sparse": SPARSE, "hidden": HIDDEN, "attention": ATTENTION, "relation": RELATION}
WITHOUT = {
    "repdistiller_kdsvd": (
        "leading singular vectors of feature maps, whose signs are not unique: the gradient is not defined where the "
        "alignment of signs flips, and none is recorded, so that there is nothing to hold a training loss to"
    )
}
TITLES = {
    "logits": "Logits",
    "sparse": "Logits kept at some classes",
    "hidden": "Hidden states",
    "attention": "Attention",
    "relation": "Relations and feature maps",
}
OURS = ["float64: value, gradient", "float32: value, gradient"]
HEADINGS = ["original", "kind", "cases", "ours", *OURS, "its own", "what differs"]
INTRO = """# Parity with the originals

Made by `python docs/make_parity.py` from what `tests/test_loss_parity.py` and `tests/test_inner_loss_parity.py`
compute: each original's loss on recorded random inputs, and its gradient with respect to everything it trains
(student tensors, projections, scales), against ours. Ours are the functions of `student_train/losses`, which give a
value a row, a token or a pair; the tests add each project's own reduction, weights and conventions, defects included.
So a row says two things: that our formula is theirs, and, in its last column, what theirs does otherwise than a run
here would.

Figures are the greatest difference over a kind's cases, max |ours − theirs| / max |theirs| for each tensor; they vary
in their last digits from machine to machine. "Its own" is how far the original's float32 run is from its float64 run.
The tests allow 1e-10 where the original ran in float64 (DistillKit computes in float32), and in float32 1e-6, or ten
times the original's own difference where that is more: large logits, and differences of nearly equal terms, cost both
sides digits. Padding in ours never enters a value or a gradient, not even as NaN.
"""


def page() -> str:
    parts = [INTRO]
    for family, kinds in FAMILIES.items():
        parts.append(f"## {TITLES[family]}\n\n" + table(HEADINGS, (row(kind, family) for kind in kinds)))
    reasons = ([f"`{kind}`", reason] for kind, reason in WITHOUT.items())
    parts.append("## What no function reproduces\n\n" + table(["kind", "why"], reasons))
    parts.append("## Versions\n\n" + table(["project", "version"], sorted(versions())))
    return "\n".join(parts)


def row(kind: str, family: str) -> list[str]:
    ours, remark = FAMILIES[family][kind]
    lines = recorded(kind)
    named = ", ".join(f"`{name}`" for name in ours.split(", "))
    return [lines[0]["source"]["project"], f"`{kind}`", str(len(lines)), named, *figures(kind), remark]


def figures(kind: str) -> Iterator[str]:
    """The greatest difference of the loss and of the gradient: ours in float64, in float32, the original's own."""
    lines = recorded(kind)
    ours = [[cases.differences(line, dtype, originals()[kind]) for line in lines] for dtype in cases.DTYPES]
    for found in [*ours, [line["float32_deviation"] for line in lines]]:
        yield ", ".join(f"{max(each.get(what, 0.0) for each in found):.0e}" for what in ("loss", "gradient"))


def originals() -> dict:
    modules = (import_module(name) for name in ("test_loss_parity", "test_inner_loss_parity"))
    return {kind: original for module in modules for kind, original in module.ORIGINALS.items()}


def recorded(kind: str) -> list[dict]:
    if not cases.INDEX:
        raise SystemExit(cases.ABSENT)
    return [line for line in cases.INDEX if line["kind"] == kind]


def versions() -> set[tuple[str, str]]:
    return {(line["source"]["project"], line["source"]["version"]) for line in cases.INDEX}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
