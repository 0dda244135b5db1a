"""Every recorded case about what is inside the models: the originals' reduction and conventions, one line a kind.

s student, t teacher. A value a token, a pair or a row is ours; what is summed, and over what it is divided, is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from oracle_cases import ABSENT, DTYPES, INDEX, Case, Original, assert_reproduced, cases_of
from predistill.student_train.losses import attention, feature_maps, hidden, kl_divergence, relations
from torch import Tensor

FAMILIES = {"hidden", "attention", "relation"}
NOT_FUNCTIONS = {"repdistiller_kdsvd"}  # its gradient is not defined, nor recorded: signs of singular vectors


def hidden_pair(case: Case) -> tuple[Tensor, Tensor]:
    return case["student_hidden_state"], case["teacher_hidden_state"]


def attention_pair(case: Case) -> tuple[Tensor, Tensor]:
    return case["student_attention"], case["teacher_attention"]


def embedding_pair(case: Case) -> tuple[Tensor, Tensor]:
    return case["student_embedding"], case["teacher_embedding"]


def map_pair(case: Case) -> tuple[Tensor, Tensor]:
    return case["student_feature_map"], case["teacher_feature_map"]


def valid_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens [B, S] or pairs [B, S, S] that count."""
    if mask is None:
        return values.mean()
    mask = mask.bool()
    return values[mask if values.dim() == 2 else mask[:, :, None] & mask[:, None, :]].mean()


def total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


# --- hidden states ---


def over_tokens(loss: Original) -> Original:
    return lambda case: valid_mean(loss(*hidden_pair(case), case.get("mask")), case.get("mask"))


def textbrewer_two_layers(case: Case) -> list[Tensor]:
    return [*case["student_hidden_states"], *case["teacher_hidden_states"]]


def textbrewer_mmd(case: Case) -> Tensor:
    """With a mask it divides by the padded length instead of the width."""
    states, mask = textbrewer_two_layers(case), case.get("mask")
    if mask is not None:
        states = [h if at % 2 else h * (h.shape[-1] / h.shape[1]) for at, h in enumerate(states)]
    return valid_mean(relations.mmd(*states, mask), mask)


def tutorial_layer(case: Case) -> Tensor:
    s, t = hidden_pair(case)
    return hidden.mse(F.linear(s, case["projector.weight"], case["projector.bias"]), t).mean()


def tutorial_step(case: Case) -> Tensor:
    s, t = case["student_hidden_states"], case["teacher_hidden_states"]
    return total(hidden.mse(s[int(i)], t[j]).mean() for i, j in case.params["layer_mapping"].items())


def all_pairs(maps: Tensor) -> Tensor:
    return torch.ones_like(maps[:, :1], dtype=torch.bool)


def tutorial_tinybert(case: Case) -> Tensor:
    s, t = case["student_hidden_states"], case["teacher_hidden_states"]
    loss = total(hidden.mse(a, b).mean() for a, b in zip(s, [t[0], *t[1::2]], strict=False))
    maps = zip(case["student_attentions"], case["teacher_attentions"][::2], strict=False)
    loss = loss + total(attention.mse(a, b, all_pairs(a)).mean() for a, b in maps)
    return loss + kl_divergence(case["student_logits"], case["teacher_logits"], temperature=4.0).mean()


def tinybert(case: Case, project: Original = lambda h: h) -> Tensor:
    """Scores of -10000 are keys that are not seen; padded queries count, and so does every key in the divisor."""
    M, k = case.params["num_student_layers"], case.params["num_teacher_layers"] // case.params["num_student_layers"]
    s, t = case["student_hidden_states"], case["teacher_hidden_states"]
    loss = total(hidden.mse(project(s[i]), t[i * k]).mean() for i in range(M + 1))
    maps = [(case["student_attentions"][i], case["teacher_attentions"][(i + 1) * k - 1]) for i in range(M)]
    return loss + total(attention.mse(a, b, a[:, :1] > -100).mean() for a, b in maps)


def haystack_tinybert(case: Case) -> Tensor:
    """All states go through the mapping that its first loop left."""
    mappings = case.get("dim_mappings.1.weight") is not None
    weight = case[f"dim_mappings.{case.params['num_student_layers'] - 1}.weight"] if mappings else None
    return tinybert(case, (lambda h: h) if weight is None else lambda h: F.linear(h, weight))


def huawei_tinybert(case: Case) -> Tensor:
    if case.get("fit_dense.weight") is None:
        return tinybert(case)
    return tinybert(case, lambda h: F.linear(h, case["fit_dense.weight"], case["fit_dense.bias"]))


def distillkit_hidden(case: Case) -> Tensor:
    loss, layers = {"mse": hidden.mse, "cosine": hidden.cosine}[case.params["kind"]], []
    for n, (i, j) in enumerate(case.params["layer_mapping"]):
        s, weight = case["student_hidden_states"][i], case.get(f"projections.{n}.weight")
        s = s if weight is None else F.linear(s, weight)
        layers.append(valid_mean(loss(s, case["teacher_hidden_states"][j]), case.get("mask")))
    return total(layers) / len(layers)


# --- attention ---


def textbrewer_att_mse(case: Case, heads: str = "auto") -> Tensor:
    """Without a mask, entries up to -0.001 (of the sum over heads, where there is one) become 0 on each side.
    [B, S, S] is one head."""
    s, t = (a if a.dim() == 4 else a.unsqueeze(1) for a in attention_pair(case))
    if case.get("mask") is not None:
        return valid_mean(attention.mse(s, t, all_pairs(s), heads=heads), case["mask"])
    s, t = (torch.where(a <= -1e-3, 0.0, a) for a in attention.paired_heads(s, t, heads))
    return attention.mse(s, t, all_pairs(s)).mean()


def textbrewer_att_ce(case: Case, averaged: bool = False) -> Tensor:
    """Cross entropy between softmaxes over all keys, of which only some are summed: those of the mask, or, without one,
    those whose teacher's score is above -0.001. With the kept keys' masses P and Q it is P (ours - log Q)."""
    s, t = (a.mean(1) if averaged and a.dim() == 4 else a for a in attention_pair(case))
    mask = case.get("mask")
    copies = s.shape[1] if s.dim() == 4 else 1
    s, t = (a.reshape(-1, 1, *a.shape[-2:]) for a in (s, t))  # each head as a row of its own, for a head's own keys
    if mask is None:
        summed = t > -1e-3
    else:
        mask = mask.bool().repeat_interleave(copies, 0)
        summed = mask[:, None, None, :].expand_as(t)
    masses = [a.masked_fill(~summed, -torch.inf).logsumexp(-1) - a.logsumexp(-1) for a in (s, t)]
    log_q, p = masses[0].squeeze(1), masses[1].squeeze(1).exp()
    seen = summed.any(-1).squeeze(1)
    kept = torch.where(seen, log_q, 0.0)
    return valid_mean(p * (attention.soft_cross_entropy(s, t, summed) - kept), mask)


def tutorial_attention(case: Case) -> Tensor:
    s, t = case["student_attentions"], case["teacher_attentions"]
    pairs = [(s[int(i)], t[j]) for i, j in case.params["layer_mapping"].items()]
    return total(attention.mse(a, b, all_pairs(a), heads="repeat").mean() for a, b in pairs) / len(pairs)


# --- relations ---


def of_rows(loss: Original, pair: Original = embedding_pair) -> Original:
    return lambda case: loss(*pair(case)).mean()


def dark_rank(case: Case) -> Tensor:
    p = case.params
    return relations.hard_dark_rank(
        *embedding_pair(case), alpha=p["alpha"], beta=p["beta"], neighbours=p["permute_len"]
    ).mean()


def rkd(case: Case) -> Tensor:
    return relations.rkd(*embedding_pair(case), distance=case.params["w_d"], angle=case.params["w_a"]).mean()


def repdistiller_fsp(case: Case) -> Tensor:
    s, t = case["student_feature_maps"], case["teacher_feature_maps"]
    return total(feature_maps.fsp(*s[i : i + 2], *t[i : i + 2]).mean() for i in range(len(s) - 1))


def repdistiller_vid(case: Case) -> Tensor:
    """Its regressor: three 1x1 convolutions without bias, ReLU between."""
    s, t = map_pair(case)
    for at in (0, 2, 4):
        s = F.conv2d(F.relu(s) if at else s, case[f"regressor.{at}.weight"])
    return feature_maps.vid(s, t, case["log_scale"]).mean()


def minilmv2(case: Case) -> Tensor:
    kinds, loss = ("query", "key", "value"), torch.zeros(())
    for pair, weight in case.params["relations"].items():
        m, n = (kinds[int(number) - 1] for number in pair.split(","))
        s, t = ((case[f"{side}_{m}"], case[f"{side}_{n}"]) for side in ("student", "teacher"))
        rows = relations.minilm(*s, *t, mask=case["mask"], heads=case.params["num_relation_heads"])
        loss = loss + weight * rows.mean()
    return loss


ORIGINALS: dict[str, Original] = {
    "textbrewer_hid_mse_loss": over_tokens(hidden.mse),
    "textbrewer_cos_loss": over_tokens(hidden.cosine),
    "textbrewer_pkd_loss": of_rows(hidden.pkd, hidden_pair),
    "textbrewer_fsp_loss": lambda case: feature_maps.fsp(*textbrewer_two_layers(case), case.get("mask")).mean(),
    "textbrewer_mmd_loss": textbrewer_mmd,
    "tutorial_layer_distillation_loss": tutorial_layer,
    "tutorial_layer_distillation_step": tutorial_step,
    "tutorial_tinybert_distillation": tutorial_tinybert,
    "tinybert_intermediate": huawei_tinybert,
    "haystack_tinybert_intermediate": haystack_tinybert,
    "distillkit_hidden_state_loss": distillkit_hidden,
    "textbrewer_att_mse_loss": textbrewer_att_mse,
    "textbrewer_att_mse_sum_loss": lambda case: textbrewer_att_mse(case, "sum"),
    "textbrewer_att_ce_loss": textbrewer_att_ce,
    "textbrewer_att_ce_mean_loss": lambda case: textbrewer_att_ce(case, averaged=True),
    "tutorial_attention_loss": tutorial_attention,
    "rkd_distance": of_rows(relations.rkd_distance),
    "rkd_angle": of_rows(relations.rkd_angle),
    "rkd_hard_dark_rank": dark_rank,
    "repdistiller_rkd": rkd,
    "repdistiller_similarity_preserving": of_rows(relations.similarity),
    "torchdistill_spkd": of_rows(lambda s, t: relations.similarity(s, t, norm=1.0)),
    "repdistiller_pkt": of_rows(relations.pkt),
    "repdistiller_cc": of_rows(relations.cc),
    "repdistiller_attention_transfer": lambda case: feature_maps.attention_transfer(
        *map_pair(case), p=case.params["p"]
    ).mean(),
    "repdistiller_nst": of_rows(feature_maps.nst, map_pair),
    "repdistiller_fsp": repdistiller_fsp,
    "repdistiller_vid": repdistiller_vid,
    "minilmv2_relation_loss": minilmv2,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("line", cases_of(ORIGINALS))
def test_original_is_reproduced(line: dict, dtype: torch.dtype) -> None:
    assert_reproduced(line, dtype, ORIGINALS[line["kind"]])


@pytest.mark.skipif(not INDEX, reason=ABSENT)
def test_no_kind_is_forgotten() -> None:
    kinds = {line["kind"] for line in INDEX if line["family"] in FAMILIES}
    assert kinds == set(ORIGINALS) | NOT_FUNCTIONS
