"""AUC with its standard error, log loss, and the score of both by which models are chosen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_CALMEST = 0.1
"""What logits are multiplied by at least: order stays, whatever validation says."""
_HALVINGS = 30
FEW = 50
"""Rows of a class below which an AUC is off by some hundredths, and its standard error unsure."""


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
    above, below = _placements(scores, labels)
    return _error(above, below)


def score(area: float, loss: float, labels: Tensor) -> float:
    """What models are chosen by: AUC minus log loss, in units in which a fair coin's is its own.

    The log loss counts over what guessing the rate of clicks costs, which is little where clicks
    are rare: then differences of it are small, and say as much as those of the AUC or more.

    Args:
        area: `auc` on some split.
        loss: `log_loss` there.
        labels: of that split, `[n]`.
    """
    return area - loss * _unit(labels)


def score_error(first: Tensor, second: Tensor, labels: Tensor) -> float:
    """Standard error of the difference of two models' scores on one split, as `auc_error` has it.

    Both have the same samples, so most of what samples change is in both and cancels.

    Args:
        first: logits of one model, `[n]`.
        second: of the other.
        labels: `[n]`, zeros and ones.

    Returns:
        NaN with fewer than two of a class.
    """
    positive = labels > 0.5
    unit, parts = _unit(labels) / len(labels), []
    for logits in (first, second):
        above, below = _placements(logits, labels)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits.double(), labels.double(), reduction="none"
        )
        parts.append(
            (
                above - unit * len(above) * losses[positive],
                below - unit * len(below) * losses[~positive],
            )
        )
    return _error(parts[0][0] - parts[1][0], parts[0][1] - parts[1][1])


def calming(logits: Tensor, labels: Tensor) -> float:
    """What logits that are too sure are to be multiplied by, below 1; 1 where that is not certain.

    That which makes held out labels likeliest, if it does by more than a standard error. Models are
    chosen by those labels, so that others want it smaller still: what is below 1 here is not by
    chance. Of a class with fewer than `FEW` rows some model of many has nearly all in order, and
    errors say nothing: then each class is taken to have one row more of either label, as Platt has
    it (Advances in Large Margin Classifiers, 1999), and what is likeliest holds. O(n).

    Args:
        logits: `[n]`.
        labels: `[n]`, zeros and ones.
    """
    said, y = logits.double(), labels.double()
    positive = int((labels > 0.5).sum())
    few = rarer(len(labels), positive)[0] < FEW
    if few:
        of_negatives = 1 / (len(labels) - positive + 2)
        y = torch.where(labels > 0.5, (positive + 1) / (positive + 2), of_negatives).double()

    def losses(factor: float) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(factor * said, y, reduction="none")

    def slope(factor: float) -> float:
        return float(((torch.sigmoid(factor * said) - y) * said).sum())

    low, high = _CALMEST, 1.0
    if not slope(high) > 0:
        return 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    gain = losses(1.0) - losses(high)
    return high if few or float(gain.mean()) > float(gain.std()) / len(gain) ** 0.5 else 1.0


def _unit(labels: Tensor) -> float:
    rate = float((labels > 0.5).double().mean()) if len(labels) else 0.0
    if not 0 < rate < 1:
        return 1.0
    return math.log(2) / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def _placements(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each positive the share of negatives below it, of each negative that of positives above.

    float64; empty with an empty class.
    """
    positive = labels > 0.5
    classes = (scores[positive], scores[~positive])
    ranks = _mid_ranks(scores)
    above = (ranks[positive] - _mid_ranks(classes[0])) / max(len(classes[1]), 1)
    below = (ranks[~positive] - _mid_ranks(classes[1])) / max(len(classes[0]), 1)
    return above, 1 - below


def _error(above: Tensor, below: Tensor) -> float:
    if min(len(above), len(below)) < 2:
        return float("nan")
    return math.sqrt(float(above.var()) / len(above) + float(below.var()) / len(below))


def _mid_ranks(scores: Tensor) -> Tensor:
    """Rank of each score from 1 on, float64 `[n]`; equal ones share the mean of theirs."""
    values, order = torch.sort(scores.detach().double())
    _, inverse, size = torch.unique_consecutive(values, return_inverse=True, return_counts=True)
    mid_rank = torch.cumsum(size, 0).double() - (size.double() - 1) / 2
    return torch.empty_like(values).index_copy_(0, order, mid_rank[inverse])


def one_class(rows: int, positive: int) -> str:
    """What is said of rows that no AUC can be of; empty where both classes are there."""
    if 0 < positive < rows:
        return ""
    return f"{rows:,} rows, all of them {'positive' if positive else 'negative'}"


def rarer(rows: int, positive: int) -> tuple[int, str]:
    """How many rows the class has that fewer are of, and the same in words."""
    few, name = min((positive, "positive"), (rows - positive, "negative"))
    return few, f"{few:,} {name} row{'' if few == 1 else 's'}"


def log_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log likelihood in nats of labels given logits, both `[n]`."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    return float(loss)
