"""Every recorded logits case of the originals: their reduction, one line a kind, made from our values a row.

Divided out where the original has no T^2; everything else is how each project sums and mixes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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

Case = SimpleNamespace  # s, t: logits; y: labels; T; p: params; hard: the student's own loss; mask

NOT_TERMS = {"torchdistill_dist_loss"}  # compares classes across the batch: not a value a row


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


ORIGINALS: dict[str, Callable[[Case], torch.Tensor]] = {
    "haystack_prediction_layer": haystack,
    "tutorial_distillation_loss": tutorial,
    "nlp_architect_distill_loss": nlp_architect,
    "nlp_architect_distill_loss_dict": nlp_architect_dict,
    "torchdistill_kd_loss": torchdistill,
    "torchdistill_logit_std_kd_loss": lambda case: torchdistill(case, standardize_logits),
    "textbrewer_kd_ce_loss": lambda case: (soft(case) / case.T**2).mean(),
    "textbrewer_kd_mse_loss": lambda case: (mse(case.s, case.t) / case.T**2).mean(),
    "trl_generalized_jsd": trl,
    "mdistiller_kd_loss": lambda case: kd(case).mean(),
    "repdistiller_distill_kl": lambda case: kd(case).sum() / len(case.s),
    "lskd_kd_loss": lskd_kd,
    "mdistiller_dkd_loss": decoupled,
    "lskd_dkd_loss": decoupled,
    "tinybert_prediction_layer": lambda case: soft(case).mean() / case.T**2 / case.s.shape[-1],
    "distillkit_dense_kl": lambda case: kd(case)[case.mask].mean(),
}


def recorded() -> tuple[Path, list[dict]]:
    beside = Path(__file__).resolve().parents[2] / "shared" / "oracles"
    folder = Path(os.environ.get("PREDISTILL_ORACLES") or beside)
    index = folder / "index.json"
    return folder, json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []


FOLDER, INDEX = recorded()
ABSENT = pytest.mark.skip(reason="no oracle cases found; set PREDISTILL_ORACLES to their folder")
CASES = [pytest.param(line, id=line["name"]) for line in INDEX if line["kind"] in ORIGINALS]
CASES = CASES or [pytest.param(None, marks=ABSENT)]


def tensors_of(line: dict, prefix: str, name: str) -> list[torch.Tensor]:
    """Tensors `prefix.name`, or the list `prefix.name.0`, `prefix.name.1`, …"""
    from safetensors.torch import load_file

    tensors = load_file(FOLDER / line["file"])
    whole = f"{prefix}.{name}"
    numbered = [key for key in tensors if key.startswith(whole + ".")]
    numbered.sort(key=lambda key: int(key.rsplit(".", 1)[1]))
    return [tensors[key] for key in ([whole] if whole in tensors else numbered)]


def load(line: dict, dtype: torch.dtype) -> tuple[Case, list[torch.Tensor]]:
    def one(name: str) -> torch.Tensor | None:
        found = tensors_of(line, "in", name)
        if not found:
            return None
        return found[0].to(dtype) if found[0].is_floating_point() else found[0]

    students = [z.to(dtype).requires_grad_() for z in tensors_of(line, "in", "student_logits")]
    teachers = [z.to(dtype) for z in tensors_of(line, "in", "teacher_logits")]
    several = len(students) > 1
    temperature = line["params"].get("temperature")
    case = Case(
        s=students if several else students[0],
        t=teachers if several else teachers[0],
        y=one("labels"),
        T=one("temperature") if temperature is None else temperature,
        p=line["params"],
        hard=one("student_loss"),
        mask=one("mask"),
    )
    return case, students


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|a - b| / max|b|; the plain distance where b is all zero."""
    scale = theirs.abs().max().item() or 1.0
    return (ours.double() - theirs.double()).abs().max().item() / scale


def tolerance(line: dict, dtype: torch.dtype, what: str) -> float:
    """The oracle README's: 1e-10 in float64; in float32 1e-6, or 10 times the original's own deviation."""
    if dtype == torch.float64 and line["run_dtype"] == "float64":
        return 1e-10
    return max(1e-6, 10 * line["float32_deviation"].get(what, 0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("line", CASES)
def test_original_is_reproduced(line: dict, dtype: torch.dtype) -> None:
    case, students = load(line, dtype)
    loss = ORIGINALS[line["kind"]](case)
    slopes = torch.autograd.grad(loss, students)
    assert relative(loss.detach(), tensors_of(line, "out", "loss")[0]) <= tolerance(line, dtype, "loss")
    for slope, gradient in zip(slopes, tensors_of(line, "out", "grad.student_logits"), strict=True):
        assert relative(slope, gradient) <= tolerance(line, dtype, "gradient")


@pytest.mark.skipif(not INDEX, reason="no oracle cases found; set PREDISTILL_ORACLES to their folder")
def test_no_logits_kind_is_forgotten() -> None:
    kinds = {line["kind"] for line in INDEX if line["family"] == "logits"}
    assert kinds == (set(ORIGINALS) | NOT_TERMS) & kinds
