"""Methods that train twice: a search, and training with what it found."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amtl.errors import UserError
from amtl.peers import DoesNotFit, SearchingPeer
from amtl.run.learner import Learner
from amtl.run.metrics import score
from amtl.run.race import Trials


class SearchLearner(Learner):
    """A search: the method's penalty joins the loss, and rates don't fall.

    Where a method has an `architecture`, a batch of the validation split trains that after each
    step: by the loss itself (the first-order form of DARTS, arXiv 1806.09055), or by what the
    method makes of it in `architecture_loss`, such as a reward.
    """

    _architecture: torch.optim.Optimizer | None = None

    def _make_optimizers(self) -> None:
        super()._make_optimizers()
        own = self.table.architecture()  # type: ignore[operator]
        self._architecture = torch.optim.Adam(own, self.config.mask_lr) if own else None

    def _train_step(self, samples: Tensor) -> float:
        loss = super()._train_step(samples)
        if self._architecture is not None:
            val = self.task.val
            batch = val.batch(torch.randint(len(val), (min(len(val), len(samples)),)))
            self.model.zero_grad()
            self.table.trying = True  # type: ignore[assignment]
            losses = nn.functional.binary_cross_entropy_with_logits(
                self.model(batch), batch.labels, batch.weights, reduction="none"
            )
            self.table.trying = False  # type: ignore[assignment]
            self.table.architecture_loss(losses).backward()  # type: ignore[operator]
            self._architecture.step()
            self.model.zero_grad()
        return loss

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        loss = super()._loss(logits, labels, weights)
        penalty = self.table.penalty()  # type: ignore[operator]
        return loss if penalty is None else loss + penalty

    def _turn(self) -> None:
        self.finished = True

    def freeze(self) -> None:
        """Nothing: what is found settles in a table of its own."""


def is_search(table: nn.Module) -> bool:
    """Whether a table is of a method that trains twice, and has not searched yet."""
    return isinstance(table, SearchingPeer) and not bool(table.settled)


def search(learner: Learner, trials: Trials) -> Learner:
    """Searches, and returns a fresh learner with what was found.

    Args:
        learner: fresh, of a table that `is_search`; its settings and task are used.
        trials: by what it is trained.

    Raises:
        UserError: what was found does not fit the budget, or no validation gave an AUC.
    """
    config, task, taught, found = learner.config, learner.task, learner.taught, learner
    if learner.table.phase == "search":
        learner.release()
        found = SearchLearner(config, task, taught=taught)
    table: SearchingPeer = found.table  # type: ignore[assignment]
    trials.observer.begin(f"{config.method} searches", found.steps_per_epoch * config.epochs, 0)
    validations = 0
    while not found.finished:
        trials.step(found)
        if len(found.history) > validations:
            validations = len(found.history)
            if table.searched() or trials.late():
                break
    if not table.takes_last:
        found.end()
    table.conclude(lambda: score(*found.scores(), task.val.labels, task.val.weights))
    try:
        fresh = Learner(config, task, lambda made: made.settle(table), taught)  # type: ignore[operator]
    except DoesNotFit as error:
        raise UserError(f"--method {config.method}: {error}") from error
    if table.keeps_model:
        with torch.no_grad():
            mine, theirs = fresh.model.dense_parameters(), found.model.dense_parameters()
            for parameter, other in zip(mine, theirs, strict=True):
                parameter.copy_(other)
    fresh.seconds = found.seconds + sum(record["seconds"] for record in found.history)
    if table.goes_on:
        fresh.refine()
    fresh.finished = not table.trains_again
    return fresh
