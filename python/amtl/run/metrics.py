"""AUC with its standard error, log loss, and the score of both by which models are chosen.

All of them may weigh rows, where one of weight 2 counts as two that are alike: `weights` are `[n]`,
0 or more, in whatever unit; None: all rows weigh the same. Standard errors take a row of whatever
weight for one that was drawn, so weights that differ make them larger, and no unit of them does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_CALMEST = 0.1
"""What logits are multiplied by at least: order stays, whatever validation says."""
_HALVINGS = 30
FEW = 50
"""Rows of a class below which an AUC is off by some hundredths, and its standard error unsure."""


def auc(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative.

    Ties count one half, and a pair the product of its weights. O(n log n). NaN if only one class is
    present, or weighs anything.

    Args:
        scores: `[n]`, any monotone score.
        labels: `[n]`, zeros and ones.
        weights: see above.
    """
    positive = labels.to(torch.float64)
    if weights is not None:
        positives, negatives = positive * weights, (1 - positive) * weights
        pairs = float(positives.sum()) * float(negatives.sum())
        won = float((_weight_below(scores, negatives) * positives).sum())
        return won / pairs if pairs else float("nan")
    n_positive = float(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    rank_sum = float((_mid_ranks(scores) * positive).sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def auc_error(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Standard error of `auc`: how far other samples of as many of each class would be off.

    DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988): the variance over positives of the
    share of negatives below each, and the other way round; by mid-ranks as Sun and Xu (IEEE Signal
    Processing Letters 21, 2014). What other seeds of the training would change is not in it.
    O(n log n). NaN with fewer than two of a class that weigh anything.

    Args:
        scores: `[n]`, any monotone score.
        labels: `[n]`, zeros and ones.
        weights: see above.
    """
    above, below = _placements(scores, labels, weights)
    return _error(above, below, labels, weights)


def grouped_auc(
    scores: Tensor, labels: Tensor, groups: Tensor, weights: Tensor | None = None
) -> tuple[float, int, float]:
    """The mean of the AUC within groups, as users, by their rows: GAUC of Zhu et al. (KDD 2017).

    A model that knows nothing but which users click much has .5, whatever its AUC. Groups with one
    class have none and are left out. O(n log n).

    Args:
        scores: `[n]`, any monotone score.
        labels: `[n]`, zeros and ones.
        groups: int64 `[n]`, equal in rows of one group; those below 0 are of none.
        weights: see above; groups count by what their rows weigh.

    Returns:
        The mean, NaN if no group has both classes; how many groups have; what share of all rows
        they are.
    """
    there = groups >= 0
    _, group = torch.unique(groups[there], return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0
    positive = labels[there].double()
    weight = torch.ones_like(positive) if weights is None else weights[there].double()

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, group, values)

    positives, negatives = positive * weight, (1 - positive) * weight
    # Scores take whole numbers that are apart by more than a group's are, so that all of one group
    # are below all of the next, and what is below them there is known.
    _, order = torch.unique(scores[there].detach().double(), return_inverse=True)
    ranks = group * (int(order.max()) + 1 if len(order) else 1) + order
    below = _weight_below(ranks, negatives)
    of_negatives = sums(negatives)
    before = torch.cumsum(of_negatives, 0) - of_negatives
    won = sums((below - before[group]) * positives)
    pairs, weighs = sums(positives) * of_negatives, sums(weight)
    both = pairs > 0
    total = _total(labels, weights)
    share = float(weighs[both].sum()) / total if total else 0.0
    if not both.any():
        return float("nan"), 0, share
    mean = float((won[both] / pairs[both] * weighs[both]).sum() / weighs[both].sum())
    return mean, int(both.sum()), share


def score(area: float, loss: float, labels: Tensor, weights: Tensor | None = None) -> float:
    """What models are chosen by: AUC minus log loss, in units in which a fair coin's is its own.

    The log loss counts over what guessing the rate of clicks costs, which is little where clicks
    are rare: then differences of it are small, and say as much as those of the AUC or more.

    Args:
        area: `auc` on some split.
        loss: `log_loss` there.
        labels: of that split, `[n]`.
        weights: of its rows, see above.
    """
    return area - loss * _unit(labels, weights)


def score_error(
    first: Tensor, second: Tensor, labels: Tensor, weights: Tensor | None = None
) -> float:
    """Standard error of the difference of two models' scores on one split, as `auc_error` has it.

    Both have the same samples, so most of what samples change is in both and cancels. The unit of
    the log loss is taken as it is, which weights of other samples would change a little.

    Args:
        first: logits of one model, `[n]`.
        second: of the other.
        labels: `[n]`, zeros and ones.
        weights: see above.

    Returns:
        NaN with fewer than two of a class that weigh anything.
    """
    positive = labels > 0.5
    unit, parts = _unit(labels, weights) / _total(labels, weights), []
    for logits in (first, second):
        above, below = _placements(logits, labels, weights)
        losses = _around_mean(_losses(logits, labels), weights)
        parts.append(
            (
                above - unit * _total(above, _of(weights, positive)) * losses[positive],
                below - unit * _total(below, _of(weights, ~positive)) * losses[~positive],
            )
        )
    return _error(parts[0][0] - parts[1][0], parts[0][1] - parts[1][1], labels, weights)


def calming(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """What logits that are too sure are to be multiplied by, below 1; 1 where that is not certain.

    That which makes held out labels likeliest, if it does by more than a standard error. Models are
    chosen by those labels, so that others want it smaller still: what is below 1 here is not by
    chance. Of a class with fewer than `FEW` rows some model of many has nearly all in order, and
    errors say nothing: then each class is taken to have one row more of either label, as Platt has
    it (Advances in Large Margin Classifiers, 1999), and what is likeliest holds. O(n).

    Args:
        logits: `[n]`.
        labels: `[n]`, zeros and ones.
        weights: see above. Rows that weigh anything are counted.
    """
    if weights is not None:
        there = weights > 0
        logits, labels, weights = logits[there], labels[there], weights[there]
    said, y = logits.double(), labels.double()
    positive = int((labels > 0.5).sum())
    few = rarer(len(labels), positive)[0] < FEW
    if few:
        of_negatives = 1 / (len(labels) - positive + 2)
        y = torch.where(labels > 0.5, (positive + 1) / (positive + 2), of_negatives).double()

    def slope(factor: float) -> float:
        slopes = (torch.sigmoid(factor * said) - y) * said
        return float((slopes if weights is None else slopes * weights).sum())

    low, high = _CALMEST, 1.0
    if not slope(high) > 0:
        return 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    gain = _losses(said, y) - _losses(high * said, y)
    error = math.sqrt(_variance_of_mean(_around_mean(gain, weights), weights))
    return high if few or _mean(gain, weights) > error else 1.0


def _unit(labels: Tensor, weights: Tensor | None) -> float:
    rate = _mean((labels > 0.5).double(), weights) if len(labels) else 0.0
    if not 0 < rate < 1:
        return 1.0
    return math.log(2) / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def _placements(scores: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each positive the share of negatives below it, of each negative that of positives above.

    With weights less their mean, see `_around_mean`. float64; empty with an empty class.
    """
    positive = labels > 0.5
    if weights is not None:
        of = weights[positive].double(), weights[~positive].double()
        above = _weight_below(scores, weights * ~positive)[positive] / of[1].sum()
        below = _weight_below(scores, weights * positive)[~positive] / of[0].sum()
        return _around_mean(above, of[0]), _around_mean(1 - below, of[1])
    classes = (scores[positive], scores[~positive])
    ranks = _mid_ranks(scores)
    above = (ranks[positive] - _mid_ranks(classes[0])) / max(len(classes[1]), 1)
    below = (ranks[~positive] - _mid_ranks(classes[1])) / max(len(classes[0]), 1)
    return above, 1 - below


def _error(above: Tensor, below: Tensor, labels: Tensor, weights: Tensor | None) -> float:
    """Standard error of a sum of two means, over positive and over negative rows."""
    positive = labels > 0.5
    classes = (above, _of(weights, positive)), (below, _of(weights, ~positive))
    if min(len(values) if of is None else int((of > 0).sum()) for values, of in classes) < 2:
        return float("nan")
    return math.sqrt(sum(_variance_of_mean(*each) for each in classes))


def _variance_of_mean(values: Tensor, weights: Tensor | None) -> float:
    """Of as many rows as these; with weights of values `_around_mean`.

    A row of more weight adds more, and what it adds is what varies (the sandwich of a ratio, see
    Cochran, Sampling Techniques, 1977, chapter 6): rows count as few as Kish's effective number,
    `(sum w)^2 / sum w^2`, where weights have nothing to do with values.
    """
    if weights is None:
        return float(values.var()) / len(values)
    there = weights > 0
    share = weights[there].double() / weights.sum(dtype=torch.float64)
    added, rows = share * values[there], 1 / float(share.square().sum())
    # One that outweighs all others tells of no other sample.
    if not rows > 1:
        return float("nan")
    return float((added - added.mean()).square().sum()) * rows / (rows - 1)


def _around_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values less their mean, on which what a row of more weight adds depends.

    Without weights as they are, for their variance is the same.
    """
    return values if weights is None else values - _mean(values, weights)


def _mean(values: Tensor, weights: Tensor | None) -> float:
    """Mean of float64 values."""
    if weights is None:
        return float(values.mean())
    return float((values * weights).sum() / weights.sum(dtype=torch.float64))


def _total(rows: Tensor, weights: Tensor | None) -> float:
    """What rows weigh together."""
    return len(rows) if weights is None else float(weights.sum(dtype=torch.float64))


def _of(weights: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if weights is None else weights[rows]


def _weight_below(scores: Tensor, weights: Tensor) -> Tensor:
    """What weighs all that scores lower than each, and half of what scores the same: float64 `[n]`.

    Args:
        scores: `[n]`.
        weights: `[n]`.
    """
    values, order = torch.sort(scores.detach().double())
    _, inverse, size = torch.unique_consecutive(values, return_inverse=True, return_counts=True)
    alike = torch.zeros(len(size), dtype=torch.float64).index_add_(
        0, inverse, weights[order].double()
    )
    below = torch.cumsum(alike, 0) - alike / 2
    return torch.empty_like(values).index_copy_(0, order, below[inverse])


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


def log_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Mean negative log likelihood in nats of labels given logits, both `[n]`."""
    return _mean(_losses(logits, labels), weights)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row, float64 `[n]`."""
    return nn.functional.binary_cross_entropy_with_logits(
        logits.double(), labels.double(), reduction="none"
    )
