"""Several teachers as one: how their answers are averaged, and how much each weighs.

K teachers, each with logits z_k [..., C], and weights w_k that add up to 1: a number a teacher [K], or one for each
teacher and row (or token) [K, ..., 1]. What comes out are logits of one teacher, at temperature 1, and whatever is done
with logits is done with these: a loss at temperature T compares with softmax(combined / T).

    probabilities   log sum_k w_k softmax(z_k)   the arithmetic mean of the distributions (a mixture). KL(p || q) to it
                                                 has the gradient of sum_k w_k KL(p_k || q), at temperature 1
    logits          sum_k w_k z_k                the geometric mean of the distributions, normalised (a product)

To the first sum_k w_k logsumexp(z_k) is added, a number a row that no softmax sees: K times the same teacher is that
teacher, logit by logit, and rows that are compared by their logits (windows of a question) stay comparable.

Hinton et al. 2015 (arXiv:1503.02531) name both means; You et al. 2017 (doi:10.1145/3097983.3098135) average
probabilities after each is softened, which is the first row at T = 1 alone; the second is the same at every T. Heads of
several labels are averaged class by class (sigmoids or logits), regressions always as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid, mse_loss

from ..losses.catalogue import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from .settings import AVERAGES


def combined(logits: Tensor, weights: Tensor, average: str, problem_type: str = SINGLE_LABEL) -> Tensor:
    """[K, ..., C], weights [K] or [K, ..., 1] -> logits [..., C] of the ensemble. -inf marks what cannot be.

    Raises ValueError for another average.
    """
    if average not in AVERAGES:
        raise ValueError(f"average is one of {', '.join(AVERAGES)}; got {average!r}")
    weights = _shaped(weights, logits)
    if average == "logits" or problem_type == REGRESSION:
        impossible = logits == -torch.inf
        mean = (weights * logits.masked_fill(impossible, 0)).sum(0)
        return mean.masked_fill((impossible & (weights > 0)).any(0), -torch.inf)
    log_weights = weights.log()
    if problem_type == MULTI_LABEL:
        yes, no = (torch.logsumexp(log_weights + logsigmoid(side), 0) for side in (logits, -logits))
        return yes - no
    normaliser = torch.logsumexp(logits, -1, keepdim=True)
    return torch.logsumexp(log_weights + logits - normaliser, 0) + (weights * normaliser).sum(0)


def confidence_weights(logits: Tensor, problem_type: str = SINGLE_LABEL) -> Tensor:
    """[K, ..., C] -> [K, ..., 1]: of each row (or token), more for the teachers that are surer of it.

        w_k = (1 - exp(H_k) / sum_j exp(H_j)) / (K - 1),   H_k the entropy in nats of teacher k's distribution

    The formula of CA-MKD (Zhang et al. 2022, arXiv:2201.00007) with the entropy in place of the cross entropy to the
    label: rows without a label are weighed too, and a teacher that is surely wrong is not found out. Of several labels
    H_k is the mean of the classes' entropies. Raises ValueError for regressions, which are never sure.
    """
    if problem_type == REGRESSION:
        raise ValueError("a regression has no confidence")
    if len(logits) == 1:
        return torch.ones_like(logits[..., :1])
    return (1 - torch.softmax(_entropy(logits, problem_type), 0)) / (len(logits) - 1)


def negative_log_likelihood(
    logits: Tensor, labels: Tensor, weights: Tensor, average: str, problem_type: str = SINGLE_LABEL
) -> Tensor:
    """Scalar: mean over N rows of what the labels cost under the ensemble; the squared error of regressions.

    logits: [K, N, C]; labels: int64 [N], or float [N, C] of several labels with NaN for unknown, or float [N].
    """
    if problem_type == SINGLE_LABEL and average == "probabilities":  # of the label alone: no gradient through -inf
        logprobs = torch.log_softmax(logits, -1)[:, torch.arange(len(labels)), labels]
        return -torch.logsumexp(_shaped(weights, logprobs).log() + logprobs, 0).mean()
    found = combined(logits, weights, average, problem_type)
    if problem_type == REGRESSION:
        return mse_loss(found.reshape(len(labels), -1), labels.reshape(len(labels), -1).to(found))
    if problem_type == MULTI_LABEL:
        known = ~labels.isnan()
        return binary_cross_entropy_with_logits(found[known], labels[known].to(found))
    return cross_entropy(found, labels)


def learned_weights(
    logits: Tensor, labels: Tensor, average: str, problem_type: str = SINGLE_LABEL, steps: int = 200
) -> Tensor:
    """float64 [K], adding up to 1, at which the labels cost least: stacking (Wolpert 1992) on the simplex.

    Softmax of free numbers, by LBFGS in float64 from equal weights; convex in the weights for either average, K - 1
    numbers from N rows. Arguments as for negative_log_likelihood.
    """
    free = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    logits = logits.double()
    optimizer = torch.optim.LBFGS([free], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = negative_log_likelihood(logits, labels, free.softmax(0), average, problem_type)
        loss.backward()
        return loss

    optimizer.step(closure)
    return free.detach().softmax(0)


def fixed_weights(weights: Sequence[float]) -> Tensor:
    """float64 [K], adding up to 1."""
    found = torch.tensor(weights, dtype=torch.float64)
    return found / found.sum()


def _entropy(logits: Tensor, problem_type: str) -> Tensor:
    """[..., C] -> [..., 1], in nats."""
    if problem_type == MULTI_LABEL:
        sides = torch.special.entr(torch.stack([torch.sigmoid(logits), torch.sigmoid(-logits)]))
        return sides.sum(0).mean(-1, keepdim=True)
    return torch.special.entr(torch.softmax(logits, -1)).sum(-1, keepdim=True)


def _shaped(weights: Tensor, logits: Tensor) -> Tensor:
    """[K, ..., 1], in the dtype of the logits."""
    weights = weights.to(logits)
    return weights.reshape(-1, *[1] * (logits.ndim - 1)) if weights.ndim == 1 else weights
