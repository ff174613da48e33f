"""Settings that differ from data set to data set are raced on validation, at the start of a run.

Successive halving: all candidates train for one epoch, or one lap of a long epoch, the better half
of them for another, and so on until two have met; the winner simply goes on, so its steps are not
lost. Beside them a table of full size trains for as long as they do. It is the yardstick, and tells
what each field is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amtl.errors import UserError
from amtl.layer.rounding import unit
from amtl.run.ahead import Ahead
from amtl.run.config import TrainConfig
from amtl.run.done import Done, Interrupted
from amtl.run.learner import Learner
from amtl.run.model import field_evidence
from amtl.run.progress import Observer
from amtl.run.teaching import says_of_train

CAPACITY_BITS = (16.0, 4.0, 1.0)
"""Bits a number may be worth: sizes that hardly, somewhat, strongly depend on the count."""

_AUTO: list[tuple[int | None, float | None]] = [
    *((4, capacity) for capacity in CAPACITY_BITS),
    *((8, 4.0), (2, 4.0)),
]
"""What is tried for `--bits auto`: bits of a stored number, and what sizes depend on counts by."""

_FOR_STEPS = 0.95
ALMOST_ALL = 0.9
"""Share of the numbers from which on a law of the count has nothing to decide."""

MIDDLE = 4.0
"""Of `CAPACITY_BITS`: the law where none could be told better."""

_FLAT_BITS = 1e4
_LEAST_WEIGHT = 1e-3
"""Of the most telling field's weight; a field that helped nothing keeps so much."""

FULL, FLAT = "full size", "fixed width"


def _for_ever() -> float:
    return math.inf


@dataclass(frozen=True)
class Trials:
    """By what a run makes and trains the learners that it tries.

    Attributes:
        fresh: a fresh learner of given settings and, as `taught`, a teacher's labels.
        observer: is told how it goes.
        step: takes one step of a learner.
        left: seconds until the run's time is up.
        labels: a teacher's, which learners have where their settings ask for them.
        ahead: trains what is expected meanwhile, where there are cores for it.
        tell: is told of steps that were taken there, see `Ahead.train`.
        done: keeps what is trained to its end, and has what was before the run was stopped.
    """

    fresh: Callable[..., Learner]
    observer: Observer
    step: Callable[[Learner], object]
    left: Callable[[], float] = _for_ever
    labels: Tensor | None = None
    ahead: Ahead | None = None
    tell: Callable[..., None] = lambda *told: None
    done: Done | None = None

    def late(self) -> bool:
        """Whether the time is up.

        Nothing is begun any more then, and what is being trained counts as it stands, from its
        first validation on.
        """
        return self.left() <= 0

    def taught(self, labels: Tensor) -> Trials:
        """The same with a teacher's labels."""
        return replace(self, labels=labels)

    def make(self, config: TrainConfig) -> Learner:
        """A fresh learner of these settings."""
        taught = {} if self.labels is None else {"taught": self.labels}
        learner = self.fresh(config, **taught)
        if self.done is not None:
            learner.leaving = self._leave
        return learner

    def _leave(self, learner: Learner) -> None:
        # What the time ran out for goes on where there is more of it.
        if self.done is not None and not self.late():
            self.done.give_up(learner)

    def expect(
        self, *entries: TrainConfig | Learner, steps: float = math.inf, later: bool = False
    ) -> None:
        """Says what `make` and `train` will likely be asked for; see `Ahead.expect`."""
        if self.ahead is not None and not self.late():
            for entry in entries:
                trained = isinstance(entry, TrainConfig) and self._is_done(entry)
                if not trained:
                    self.ahead.expect(entry, self.labels, steps, later)

    def forget(self, *entries: TrainConfig) -> None:
        """Of what was expected, what will not be asked for."""
        if self.ahead is not None:
            for entry in entries:
                self.ahead.forget(entry, self.labels)

    def train(self, learner: Learner, steps: float = math.inf) -> None:
        """Steps of a learner, until it has taken so many or has ended."""
        handed = self.done is not None and self.done.train(learner, steps)
        if handed or learner.finished:
            return
        try:
            if self.ahead is None or not self.ahead.train(learner, steps, self.late, self.tell):
                self._train(learner, steps)
        except Interrupted:
            self.hold(learner)
            if self.done is not None:
                self.done.keep(learner)
            raise
        here = self.ahead is None or self.ahead.of(learner) is None
        if self.done is not None and here and (learner.finished or self.late()):
            self.done.keep(learner)

    def _train(self, learner: Learner, steps: float) -> None:
        torch.set_rng_state(learner.rng)
        try:
            while learner.steps < steps and not learner.finished:
                if learner.history and self.late():
                    break
                self.step(learner)
                if self.ahead is not None:
                    self.ahead.tend()
                if self.done is not None and self.done.due():
                    learner.rng = torch.get_rng_state()
                    self.done.keep(learner)
        finally:
            learner.rng = torch.get_rng_state()

    def whole(self, learner: Learner) -> Learner:
        """The same with its numbers; trained again where a run that was stopped kept none."""
        if not learner.released:
            return learner
        again = replace(self, labels=learner.taught, left=_for_ever)
        found = again.make(learner.config)
        again.train(found)
        return found

    def says_of_train(self, learner: Learner) -> Tensor:
        """Logits of the training split by a model that is at its end; see `Teacher`."""
        return says_of_train(learner) if self.done is None else self.done.says(learner)

    def _is_done(self, config: TrainConfig) -> bool:
        return self.done is not None and self.done.has(config, self.labels)

    def hold(self, learner: Learner) -> None:
        """Makes sure that what was trained so far is in this process, not only its scores."""
        steps = learner.steps
        if self.ahead is not None and not self.ahead.hold(learner):
            self.train(learner, steps)


@dataclass(frozen=True)
class Raced:
    """What came out of a race.

    Attributes:
        config: settings of the winner, nothing left open.
        learner: the winner, as far as it has come.
        table: a row each for the full table and the candidates: `name`, `epochs` trained, best
            `score` (AUC minus log loss), `val_auc`, `val_logloss`, `stored_bytes`, `chosen`.
        evidence: what each field is worth, in nats a sample, or None where nothing asks for it.
        sized: settings of the best candidate whose rows differ in width.
    """

    config: TrainConfig
    learner: Learner
    table: list[dict[str, Any]]
    evidence: list[float] | None
    sized: TrainConfig


def is_open(config: TrainConfig) -> bool:
    """Whether `config` leaves to a race how sizes follow from counts."""
    return (
        config.race
        and config.method != "fixed"
        and (config.raced_bits or not has_law(config.table_options))
        and config.table_options.get("parametrization") != "free"
    )


def has_law(options: Mapping[str, Any]) -> bool:
    """Whether options of the table say how sizes follow from counts."""
    return bool({"capacity_bits", "init_exponent", "field_weights"} & set(options))


def candidates(config: TrainConfig, field_weights: list[float] | None) -> dict[str, TrainConfig]:
    """The settings to try by name.

    A table of fixed width is one of them where the budget allows a width of 1.
    """
    found = {}
    bits = config.number_bits
    menu: list[tuple[int | None, float | None]] = [(bits, capacity) for capacity in CAPACITY_BITS]
    if config.raced_bits:
        menu = _AUTO if not has_law(config.table_options) else [(8, None), (4, None), (2, None)]
    whole = set()
    for number_bits, capacity in menu:
        if number_bits is not None and config.budget * 32 / number_bits > ALMOST_ALL:
            whole.add(number_bits)
            if capacity not in (None, MIDDLE):
                continue
        options: dict[str, Any] = {} if number_bits is None else {"bits": number_bits}
        name = [] if number_bits is None else [f"int{number_bits}"]
        if capacity is not None:
            options["capacity_bits"] = capacity
            name.append(f"{capacity:g} bits a number")
            if field_weights is not None:
                options["field_weights"] = field_weights
        found[", ".join(name)] = with_options(config, options)
    width = flat_width(config.budget, config.dim, bits)
    if width >= 1 and not (bits is not None and bits in whole):
        flat = {"capacity_bits": _FLAT_BITS, "min_dim": width, "parametrization": "rule"}
        if bits is not None:
            flat["bits"] = bits
        found[FLAT] = with_options(config, flat)
    return found


def flat_width(budget: float, dim: int, bits: int | None) -> int:
    """Width of the widest table of equally wide rows that fits a budget, 0 for none.

    Args:
        budget: share of the bytes of `dim` numbers of 32 bits.
        dim: full width D.
        bits: of a stored number; step sizes, which some rows in a hundred would pay for, are left
            room for. None for 32.
    """
    if bits is None:
        return int(budget * dim)
    whole = unit(bits)
    return min(dim, int(_FOR_STEPS * budget * 32 / bits * dim) // whole * whole)


def plain(config: TrainConfig) -> TrainConfig:
    """`config` for a table of full size and 32 bits, as it would be trained by itself."""
    options: dict[str, Any] = {"table_options": {}, "freeze_at": None, "distillation": None}
    return replace(config, method="fixed", bits="32", masters=True, race=False, **options)


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """`config` with more options of the layer, and nothing left to race for."""
    return replace(config, table_options={**config.table_options, **options}, race=False)


def field_weights(evidence: Tensor) -> list[float] | None:
    """Factors on the counts of each field, in proportion to what it is worth; None if nothing is.

    Args:
        evidence: `[F]`, see `amtl.run.model.field_evidence`.
    """
    top = float(evidence.max())
    if not top > 0:
        return None
    weights = evidence.clamp(min=_LEAST_WEIGHT * top)
    return [float(w) for w in weights / weights.mean()]


def race(config: TrainConfig, trials: Trials) -> Raced:
    """Runs candidates against each other.

    Args:
        config: settings that `is_open`.
        trials: by what learners are made and trained.

    Returns:
        The winner. It takes about twice as many laps as there are candidates.
    """
    full = trials.make(plain(config))
    count = len(candidates(config, None))
    rungs = _rungs(count)
    trials.observer.begin(
        f"choosing among {count} settings",
        full.lap_end(sum(rungs) + len(rungs)),
        0,
    )
    trials.train(full, full.lap_end(len(rungs)))
    evidence, weights = None, None
    if config.method == "amtl":
        measured = field_evidence(full.model, full.task.val)
        evidence, weights = measured.tolist(), field_weights(measured)
    rows = [outcome(FULL, full)]
    full.release()
    entries = candidates(config, weights)
    learners, refused = _made(entries, trials)
    if not learners and config.raced_bits:
        # Too small for step sizes, or too narrow for whole bytes.
        entries = candidates(replace(config, bits="32"), weights)
        learners, refused = _made(entries, trials)
    if not learners:
        assert refused is not None
        raise refused
    alive = list(learners)
    for laps, left in enumerate(_rungs(len(alive)), 1):
        for name in reversed(alive[left:]):
            rows.append(outcome(name, learners[name]))
            learners.pop(name).release()
        alive = alive[:left]
        for name in alive:
            trials.expect(learners[name], steps=learners[name].lap_end(laps))
        for name in alive:
            trials.train(learners[name], learners[name].lap_end(laps))
        alive.sort(key=lambda name: -best_record(learners[name])["score"])
    trials.hold(learners[alive[0]])
    rows += [outcome(name, learners[name]) for name in reversed(alive)]
    for name in alive[1:]:
        learners[name].release()
    rows[-1]["chosen"] = True
    table = rows[:1] + rows[:0:-1]
    sized = next((row["name"] for row in table if row["name"] not in (FULL, FLAT)), alive[0])
    return Raced(entries[alive[0]], learners[alive[0]], table, evidence, entries[sized])


def _made(
    entries: Mapping[str, TrainConfig], trials: Trials
) -> tuple[dict[str, Learner], UserError | None]:
    """Fresh learners of those settings that fit the table and the budget, and the last refusal."""
    learners, refused = {}, None
    for name, entry in entries.items():
        learner, error = attempt(trials, entry)
        if learner is None:
            refused = error
        else:
            learners[name] = learner
    return learners, refused


def attempt(trials: Trials, config: TrainConfig) -> tuple[Learner | None, UserError | None]:
    """A fresh learner, or why there is none."""
    try:
        return trials.make(config), None
    except UserError as error:
        return None, error


def _rungs(count: int) -> list[int]:
    """How many candidates train in the first lap, the second, ...: halved down to two."""
    rungs = [count]
    while rungs[-1] > 2:
        rungs.append((rungs[-1] + 1) // 2)
    return rungs


def outcome(name: str, learner: Learner) -> dict[str, Any]:
    """What a learner has come to, as a row of `Raced.table` that is not chosen."""
    best = best_record(learner)
    keys = ("score", "val_auc", "val_logloss", "stored_bytes")
    return {
        "name": name,
        "epochs": round(learner.epochs, 2),
        **{key: best[key] for key in keys},
        "chosen": False,
    }


def best_record(learner: Learner) -> dict[str, Any]:
    """The best validation of a learner; a score below all others where none was valid."""
    if learner.best is None:
        return {"score": -math.inf, "val_auc": None, "val_logloss": None, "stored_bytes": None}
    record: dict[str, Any] = learner.best["record"]
    return record
