"""Every recorded case about logits, whole or truncated: the originals' reduction, one line a kind, of our values a row.

Divided out where the original has no T^2; everything else is how each project sums and mixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from oracle_cases import ABSENT, DTYPES, INDEX, Original, assert_reproduced, cases_of
from oracle_cases import Case as Recorded
from predistill.student_train.losses import (
    dkd,
    generalized_jsd,
    kl_divergence,
    label_loss,
    mse,
    nlp_architect_mse,
    soft_cross_entropy,
    standardize_logits,
)
from predistill.student_train.losses.relations import dist
from predistill.student_train.losses.sparse import SparseTargets, sparse_loss
from predistill.student_train.losses.terms import Term

Case = SimpleNamespace  # s, t: logits; y: labels; T; p: params; hard: the student's own loss; mask

FAMILIES = {"logits", "sparse"}


def named(recorded: Recorded) -> Case:
    """With several heads, s and t are lists."""
    temperature = recorded.params.get("temperature")
    return Case(
        s=recorded["student_logits"],
        t=recorded.get("teacher_logits"),
        y=recorded.get("labels"),
        T=recorded.get("temperature") if temperature is None else temperature,
        p=recorded.params,
        hard=recorded.get("student_loss"),
        mask=recorded.get("mask"),
    )


def hard(case: Case) -> torch.Tensor:
    return label_loss(case.s, case.y)[0].mean()


def kd(case: Case) -> torch.Tensor:
    return kl_divergence(case.s, case.t, temperature=case.T)


def soft(case: Case) -> torch.Tensor:
    return soft_cross_entropy(case.s, case.t, temperature=case.T)


def haystack(case: Case) -> torch.Tensor:
    w = case.p["distillation_loss_weight"]
    s, t = case.s.transpose(-1, -2), case.t.transpose(-1, -2)  # softmax axis -2
    if case.p["distillation_loss"] == "mse":
        return w * mse(s, t).mean() + (1 - w) * case.hard.mean()
    return w * kl_divergence(s, t, temperature=case.T).sum() / len(case.s) + (1 - w) * case.hard.mean()


def tutorial(case: Case) -> torch.Tensor:
    alpha = case.p["alpha"]
    return alpha * kd(case).mean() + (1 - alpha) * hard(case)


def nlp_architect_soft(s: torch.Tensor, t: torch.Tensor, case: Case) -> torch.Tensor:
    if case.p["loss_function"] == "mse":
        return nlp_architect_mse(s, t, temperature=case.T).mean()
    return kl_divergence(s, t, temperature=case.T).sum() / len(s)


def nlp_architect(case: Case) -> torch.Tensor:
    return case.p["loss_w"] * case.hard + case.p["dist_w"] * nlp_architect_soft(case.s, case.t, case)


def nlp_architect_dict(case: Case) -> torch.Tensor:
    soft = [nlp_architect_soft(s, t, case) for s, t in zip(case.s, case.t, strict=True)]
    return case.p["loss_w"] * case.hard + case.p["dist_w"] * sum(soft) / len(soft)


def torchdistill(case: Case, standardize: Callable = lambda z: z) -> torch.Tensor:
    s, t = (standardize(z).movedim(1, -1) for z in (case.s, case.t))  # softmax axis 1
    soft = kl_divergence(s, t, temperature=case.T).sum() / len(s)
    alpha, beta = case.p["alpha"], case.p["beta"]
    if case.y is None or not alpha:
        return soft / case.T**2
    return alpha * hard(case) + (1 - alpha if beta is None else beta) * soft


def trl(case: Case) -> torch.Tensor:
    rows = generalized_jsd(case.s, case.t, temperature=case.T, beta=case.p["beta"]) / case.T**2
    kept = torch.ones_like(rows, dtype=torch.bool) if case.y is None else case.y != -100
    batchmean = len(case.s) if case.y is None else kept.sum()
    divisors = {"batchmean": batchmean, "sum": 1, "mean": kept.sum() * case.s.shape[-1]}
    n = case.p["num_items_in_batch"] or divisors[case.p["reduction"]]
    return rows[kept].sum() / n if kept.any() else rows.sum() * 0


def lskd_kd(case: Case) -> torch.Tensor:
    s, t = (standardize_logits(z) if case.p["logit_stand"] else z for z in (case.s, case.t))
    return kl_divergence(s, t, temperature=case.T).mean()


def decoupled(case: Case) -> torch.Tensor:
    s, t = (standardize_logits(z) if case.p.get("logit_stand") else z for z in (case.s, case.t))
    return dkd(s, t, case.y, temperature=case.T, alpha=case.p["alpha"], beta=case.p["beta"]).mean()


def torchdistill_dist(case: Case) -> torch.Tensor:
    return dist(case.s, case.t, temperature=case.p["tau"], beta=case.p["beta"], gamma=case.p["gamma"]).mean()


# --- logits that were kept at some classes ---


def distillkit_targets(recorded: Recorded) -> SparseTargets:
    """Its way from one temperature to another: the kept ids' probabilities, and the rest as one lump, to a power."""
    power = recorded.params["target_generation_temperature"] / recorded.params["temperature"]
    if recorded.get("teacher_logprobs") is not None:
        logprobs = recorded["teacher_logprobs"].double()
        rest = (1 - logprobs.exp().sum(-1)).clamp(min=1e-8).log()
    else:  # logits that it renormalizes
        logprobs = recorded["teacher_topk_logits"].double()
        rest = torch.full_like(logprobs[..., 0], -math.inf)
    whole = (torch.cat([logprobs, rest.unsqueeze(-1)], -1) * power).log_softmax(-1).flatten(0, 1)
    return SparseTargets(recorded["teacher_token_ids"].flatten(0, 1), whole[:, :-1], whole[:, -1])


def distillkit_sparse(recorded: Recorded, loss: str) -> torch.Tensor:
    params, mask = recorded.params, recorded.get("mask")
    tail = {"zero": "renormalize", "symmetric_uniform": "bucket"}[params["missing"]]
    term = Term("logits", loss, temperature=params["temperature"], options={"tail": tail})
    each = sparse_loss(term, recorded["student_logits"].flatten(0, 1), distillkit_targets(recorded))
    each = each if mask is None else each[mask.flatten()]
    return each.sum() / (len(each) if params["wrapped"] else params["temperature"] ** 2)


LOGITS: dict[str, Callable[[Case], torch.Tensor]] = {
    "haystack_prediction_layer": haystack,
    "tutorial_distillation_loss": tutorial,
    "nlp_architect_distill_loss": nlp_architect,
    "nlp_architect_distill_loss_dict": nlp_architect_dict,
    "torchdistill_kd_loss": torchdistill,
    "torchdistill_logit_std_kd_loss": lambda case: torchdistill(case, standardize_logits),
    "textbrewer_kd_ce_loss": lambda case: (soft(case) / case.T**2).mean(),
    "textbrewer_kd_mse_loss": lambda case: (mse(case.s, case.t) / case.T**2).mean(),
    "trl_generalized_jsd": trl,
    "torchdistill_dist_loss": torchdistill_dist,
    "mdistiller_kd_loss": lambda case: kd(case).mean(),
    "repdistiller_distill_kl": lambda case: kd(case).sum() / len(case.s),
    "lskd_kd_loss": lskd_kd,
    "mdistiller_dkd_loss": decoupled,
    "lskd_dkd_loss": decoupled,
    "tinybert_prediction_layer": lambda case: soft(case).mean() / case.T**2 / case.s.shape[-1],
    "distillkit_dense_kl": lambda case: kd(case)[case.mask].mean(),
}
SPARSE = {"distillkit_sparse_kl": "kl", "distillkit_sparse_jsd": "jsd", "distillkit_sparse_tvd": "total_variation"}
ORIGINALS: dict[str, Original] = {
    **{kind: lambda recorded, original=original: original(named(recorded)) for kind, original in LOGITS.items()},
    **{kind: lambda recorded, loss=loss: distillkit_sparse(recorded, loss) for kind, loss in SPARSE.items()},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("line", cases_of(ORIGINALS))
def test_original_is_reproduced(line: dict, dtype: torch.dtype) -> None:
    assert_reproduced(line, dtype, ORIGINALS[line["kind"]])


@pytest.mark.skipif(not INDEX, reason=ABSENT)
def test_no_kind_is_forgotten() -> None:
    kinds = {line["kind"] for line in INDEX if line["family"] in FAMILIES}
    assert kinds == set(ORIGINALS)
