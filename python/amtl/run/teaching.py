"""Labels that a better model softens: distillation (arXiv 1503.02531) from finished models.

A click says little about how likely it was; a model that has seen all samples says more. Trained on
a mixture of both, a table of few numbers learns what the teacher knows and overfits less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amtl.run.learner import Learner
from amtl.run.metrics import auc, log_loss, score
from amtl.run.model import predict


def says_of_train(learner: Learner) -> Tensor:
    """Logits of the training split by a model that is at its end: float32 `[n]`, one pass."""
    return predict(learner.model, learner.task.train)


class Teacher:
    """Finished models of one task; their logits are averaged where that validates better.

    Args:
        says: logits of the training split by one of them.
    """

    def __init__(self, says: Callable[[Learner], Tensor] = says_of_train) -> None:
        self._says = says
        self._val: list[Tensor] = []
        self._train: list[Tensor] = []
        self._labels = torch.empty(0)
        self._weights: Tensor | None = None

    def add(self, learner: Learner) -> None:
        """Takes in what a model, trained to its end, says of two splits."""
        task = learner.task
        self._labels, self._weights = task.val.labels, task.val.weights
        self._val.append(learner.says())
        self._train.append(self._says(learner))

    def labels(self) -> Tensor:
        """Probability of a click for every training sample, float32 `[n]`.

        The best model's; others join as long as the mean of the logits validates better.
        """
        order = sorted(range(len(self._val)), key=lambda i: -self._score([i]))
        chosen = order[:1]
        for i in order[1:]:
            if self._score([*chosen, i]) > self._score(chosen):
                chosen.append(i)
        return torch.sigmoid(torch.stack([self._train[i] for i in chosen]).mean(0))

    def _score(self, models: list[int]) -> float:
        logits = torch.stack([self._val[i] for i in models]).mean(0)
        told = self._labels, self._weights
        return score(auc(logits, *told), log_loss(logits, *told), *told)
