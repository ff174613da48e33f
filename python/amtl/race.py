"""Settings that differ from data set to data set are raced on validation, at the start of a run.

Successive halving: all candidates train for one epoch, the better half of them for another, and so
on until one is left, which then simply goes on: its steps are not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from amtl.config import TrainConfig
from amtl.learner import Learner
from amtl.progress import Observer


@dataclass(frozen=True)
class Raced:
    """What came out of a race.

    Attributes:
        config: settings of the winner, nothing left open.
        learner: the winner, as far as it has come.
        table: per candidate its name, epochs trained, best validation score, AUC and log loss,
            best first.
    """

    config: TrainConfig
    learner: Learner
    table: list[dict[str, Any]]


def candidates(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The settings to try for what `config` leaves open: changes of `TrainConfig` by name."""
    return {}


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """`config` with changes; those under `table_options` are added to its own."""
    changes = dict(changes)
    options = {**config.table_options, **changes.pop("table_options", {})}
    return replace(config, **changes, table_options=options, race=False)


def race(
    config: TrainConfig,
    make: Callable[[TrainConfig], Learner],
    observer: Observer,
    step: Callable[[Learner], None],
) -> Raced:
    """Runs candidates against each other.

    Args:
        config: settings, some of them open.
        make: a fresh learner of given settings.
        observer: is told how it goes.
        step: takes one step of a learner.

    Returns:
        The winner. O(candidates · log candidates) epochs.
    """
    names = candidates(config)
    entries = {name: with_changes(config, changes) for name, changes in names.items()}
    learners = {name: make(entry) for name, entry in entries.items()}
    steps_per_epoch = next(iter(learners.values())).steps_per_epoch
    observer.begin(
        f"choosing among {len(names)} settings", sum(_rungs(len(names))) * steps_per_epoch, 0
    )
    alive = list(names)
    for epochs, left in enumerate(_rungs(len(names)), 1):
        alive = alive[:left]
        for name in alive:
            learner = learners[name]
            while learner.steps < epochs * steps_per_epoch and not learner.finished:
                step(learner)
        alive.sort(key=lambda name: -_best(learners[name])["score"])
        for name in learners.keys() - set(alive):
            learners[name].release()
    winner = alive[0]
    table = [
        {
            "name": name,
            "epochs": learner.epochs,
            "at": {k: _best(learner)[k] for k in ("score", "val_auc", "val_logloss", "epoch")},
            "chosen": name == winner,
        }
        for name, learner in learners.items()
    ]
    table.sort(key=lambda row: (-row["epochs"], -row["at"]["score"]))
    return Raced(entries[winner], learners[winner], table)


def _rungs(count: int) -> list[int]:
    """How many candidates train in the first epoch, the second, ...: halved until one is left."""
    rungs = [count]
    while rungs[-1] > 2:
        rungs.append((rungs[-1] + 1) // 2)
    return rungs


def _best(learner: Learner) -> dict[str, Any]:
    if learner.best is None:
        return {"score": -math.inf, "val_auc": math.nan, "val_logloss": math.nan, "epoch": 0.0}
    record: dict[str, Any] = learner.best["record"]
    return record
