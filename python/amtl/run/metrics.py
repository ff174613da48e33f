"""AUC and log loss."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative.

    Ties count one half. O(n log n). NaN if only one class is present.

    Args:
        scores: `[n]`, any monotone score.
        labels: `[n]`, zeros and ones.
    """
    values, order = torch.sort(scores.detach().double())
    positive = labels.to(torch.float64)[order]
    _, inverse, size = torch.unique_consecutive(values, return_inverse=True, return_counts=True)
    mid_rank = torch.cumsum(size, 0).double() - (size.double() - 1) / 2
    n_positive = float(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    rank_sum = float((mid_rank[inverse] * positive).sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def log_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log likelihood in nats of labels given logits, both `[n]`."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    return float(loss)
