"""AUC with its standard error, and log loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative.

    Ties count one half. O(n log n). NaN if only one class is present.

    Args:
        scores: `[n]`, any monotone score.
        labels: `[n]`, zeros and ones.
    """
    positive = labels.to(torch.float64)
    n_positive = float(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    rank_sum = float((_mid_ranks(scores) * positive).sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def auc_error(scores: Tensor, labels: Tensor) -> float:
    """Standard error of `auc`: how far other samples of as many of each class would be off.

    DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988): the variance over positives of the
    share of negatives below each, and the other way round; by mid-ranks as Sun and Xu (IEEE Signal
    Processing Letters 21, 2014). What other seeds of the training would change is not in it.
    O(n log n). NaN with fewer than two of a class.

    Args:
        scores: `[n]`, any monotone score.
        labels: `[n]`, zeros and ones.
    """
    positive = labels > 0.5
    classes = (scores[positive], scores[~positive])
    if min(map(len, classes)) < 2:
        return float("nan")
    ranks = _mid_ranks(scores)
    above = (ranks[positive] - _mid_ranks(classes[0])) / len(classes[1])
    below = (ranks[~positive] - _mid_ranks(classes[1])) / len(classes[0])
    return math.sqrt(float(above.var()) / len(above) + float(below.var()) / len(below))


def _mid_ranks(scores: Tensor) -> Tensor:
    """Rank of each score from 1 on, float64 `[n]`; equal ones share the mean of theirs."""
    values, order = torch.sort(scores.detach().double())
    _, inverse, size = torch.unique_consecutive(values, return_inverse=True, return_counts=True)
    mid_rank = torch.cumsum(size, 0).double() - (size.double() - 1) / 2
    return torch.empty_like(values).index_copy_(0, order, mid_rank[inverse])


def log_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log likelihood in nats of labels given logits, both `[n]`."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    return float(loss)
