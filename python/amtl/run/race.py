"""Settings that differ from data set to data set are raced on validation, at the start of a run.

Successive halving: all candidates train for one epoch, the better half of them for another, and so
on until two have met; the winner simply goes on, so its steps are not lost. Beside them a table of
full size trains for as long as they do. It is the yardstick, and tells what each field is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from amtl.errors import UserError
from amtl.layer.rounding import unit
from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.model import field_evidence
from amtl.run.progress import Observer

CAPACITY_BITS = (16.0, 4.0, 1.0)
"""Bits a number may be worth: sizes that hardly, somewhat, strongly depend on the count."""

_AUTO: list[tuple[int | None, float | None]] = [
    *((4, capacity) for capacity in CAPACITY_BITS),
    *((8, 4.0), (2, 4.0)),
]
"""What is tried for `--bits auto`: bits of a stored number, and what sizes depend on counts by."""

_FOR_STEPS = 0.95
_ALMOST_ALL = 0.9
"""Share of the numbers from which on a law of the count has nothing to decide."""

_MIDDLE = 4.0
"""Of `CAPACITY_BITS`: the law where none could be told better."""

_NEAR = 0.01
"""In AUC minus log loss: a model of fewer bytes that misses by less is no reason to stop there."""

_FLAT_BITS = 1e4
_LEAST_WEIGHT = 1e-3
"""Of the most telling field's weight; a field that helped nothing keeps so much."""

LESS = 0.3
"""Of the best model's bytes: tried too, because fewer numbers may overfit less."""

DROPOUT = 0.1
"""Share of the embeddings' numbers zeroed in training of a taught model: it gains by it, unlike a
table of few numbers a row that learns from the labels alone."""

SHARES = (0.5, 0.8)
"""Of the labels, a teacher's: data of few or noisy clicks gain by the larger one."""

_HOPELESS = 0.02
"""So far behind after as many epochs, in AUC minus log loss, nothing has been seen to catch up;
from .012 behind a table of few numbers, which learns for longer, has gone on to win by .02."""

FULL, FLAT = "full size", "fixed width"


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
        and (config.raced_bits or not _has_law(config))
        and config.table_options.get("parametrization") != "free"
    )


def _has_law(config: TrainConfig) -> bool:
    return bool({"capacity_bits", "init_exponent", "field_weights"} & set(config.table_options))


def candidates(config: TrainConfig, field_weights: list[float] | None) -> dict[str, TrainConfig]:
    """The settings to try by name.

    A table of fixed width is one of them where the budget allows a width of 1.
    """
    found = {}
    bits = config.number_bits
    menu: list[tuple[int | None, float | None]] = [(bits, capacity) for capacity in CAPACITY_BITS]
    if config.raced_bits:
        menu = _AUTO if not _has_law(config) else [(8, None), (4, None), (2, None)]
    whole = set()
    for number_bits, capacity in menu:
        if number_bits is not None and config.budget * 32 / number_bits > _ALMOST_ALL:
            whole.add(number_bits)
            if capacity not in (None, _MIDDLE):
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
    return replace(config, method="fixed", bits="32", race=False, **options)


def dropouts(config: TrainConfig) -> list[TrainConfig]:
    """`config` without dropout and with it where it leaves that open, else as it is."""
    if config.embedding_dropout is not None:
        return [config]
    return [config, replace(config, embedding_dropout=DROPOUT)]


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


def race(
    config: TrainConfig,
    make: Callable[[TrainConfig], Learner],
    observer: Observer,
    step: Callable[[Learner], None],
) -> Raced:
    """Runs candidates against each other.

    Args:
        config: settings that `is_open`.
        make: a fresh learner of given settings.
        observer: is told how it goes.
        step: takes one step of a learner.

    Returns:
        The winner. It takes about twice as many epochs as there are candidates.
    """
    full = make(plain(config))
    count = len(candidates(config, None))
    rungs = _rungs(count)
    observer.begin(
        f"choosing among {count} settings",
        (sum(rungs) + len(rungs)) * full.steps_per_epoch,
        0,
    )
    _run(full, len(rungs), step)
    evidence, weights = None, None
    if config.method == "amtl":
        measured = field_evidence(full.model, full.task.val)
        evidence, weights = measured.tolist(), field_weights(measured)
    rows = [outcome(FULL, full)]
    full.release()
    entries = candidates(config, weights)
    learners, refused = _made(entries, make)
    if not learners and config.raced_bits:
        # Too small for step sizes, or too narrow for whole bytes.
        entries = candidates(replace(config, bits="32"), weights)
        learners, refused = _made(entries, make)
    if not learners:
        assert refused is not None
        raise refused
    alive = list(learners)
    rungs = _rungs(len(alive))
    for epochs, left in enumerate(rungs, 1):
        for name in reversed(alive[left:]):
            rows.append(outcome(name, learners[name]))
            learners.pop(name).release()
        alive = alive[:left]
        for name in alive:
            _run(learners[name], epochs, step)
        alive.sort(key=lambda name: -_best(learners[name])["score"])
    rows += [outcome(name, learners[name]) for name in reversed(alive)]
    rows[-1]["chosen"] = True
    table = rows[:1] + rows[:0:-1]
    sized = next((row["name"] for row in table if row["name"] not in (FULL, FLAT)), alive[0])
    return Raced(entries[alive[0]], learners[alive[0]], table, evidence, entries[sized])


def race_bytes(
    factor: float,
    sized: TrainConfig,
    winner: Learner,
    used: float,
    make: Callable[[TrainConfig], Learner],
    observer: Observer,
    step: Callable[[Learner], None],
) -> tuple[Learner | None, dict[str, Any] | None]:
    """Trains with fewer and fewer bytes, or more and more, the budget being a limit and no aim.

    With fewer until that is twice in a row no better, or far from it: a step may only remove what
    overfits. With more until it is no better, or the budget is reached.

    Args:
        factor: what the bytes are multiplied by from step to step.
        sized: settings of the best candidate whose rows differ in width.
        winner: the best model so far, trained to its end.
        used: share of the full table's bytes that it stores.
        make: a fresh learner of given settings.
        observer: is told how it goes.
        step: takes one step of a learner.

    Returns:
        The best model of other bytes that validates better, and its row with the winner's under
        `rival`; the row of the first one tried if none does; nothing where no size fits.
    """
    rival, best, row = outcome("the best before", winner), None, None
    share, missed = min(used, sized.budget), factor > 1
    while factor < 1 or share < _ALMOST_ALL * sized.budget:
        share = min(share * factor, sized.budget)
        learner, _ = _try(make, replace(sized, budget=share))
        if learner is None:
            break
        name = f"{100 * share:.2g}% of the bytes"
        better, tried = contend(name, learner, best or winner, observer, step)
        if row is None or better is not None:
            row = {**tried, "rival": rival}
        if better is None:
            learner.release()
            if missed or tried["score"] < _best(best or winner)["score"] - _NEAR:
                break
            missed = True
            continue
        if best is not None:
            best.release()
        best, missed = better, factor > 1
    return best, row


def race_taught(
    winner: Learner,
    make: Callable[[TrainConfig], Learner],
    observer: Observer,
    step: Callable[[Learner], None],
) -> tuple[Learner | None, list[dict[str, Any]]]:
    """Trains the winner's settings anew on labels that a teacher softens; see `contend`.

    Args:
        winner: the best model so far, trained to its end.
        make: a fresh learner of given settings, which has the teacher's labels.
        observer: is told how it goes.
        step: takes one step of a learner.

    Returns:
        The best of them if it validates better, and their rows.
    """
    config, best, rows = winner.config, None, []
    if config.embedding_dropout is None:
        config = replace(config, embedding_dropout=DROPOUT)
    shares = SHARES if config.distillation is None else (config.distillation,)
    for share in shares:
        learner = make(replace(config, distillation=share))
        name = f"{share:.0%} of the labels a teacher's"
        better, row = contend(name, learner, best or winner, observer, step)
        rows.append(row)
        if better is None:
            learner.release()
            continue
        if best is not None:
            best.release()
            rows[0]["chosen"] = False
        best = better
    return best, rows


def race_law(
    sized: TrainConfig,
    winner: Learner,
    make: Callable[[TrainConfig], Learner],
    observer: Observer,
    step: Callable[[Learner], None],
) -> tuple[Learner | None, dict[str, Any] | None]:
    """Trains with the middle one of the laws where another has won; see `contend`.

    One epoch, after which a race lets the worse half go, is little to tell laws apart by.

    Args:
        sized: the winner's settings with sizes of the best candidate whose rows differ in width.
        winner: the best model so far, trained to its end.
        make: a fresh learner of given settings.
        observer: is told how it goes.
        step: takes one step of a learner.

    Returns:
        The learner if it validates better, and its row; nothing where there is no other law.
    """
    options = sized.table_options
    whole = sized.budget * 32 / options.get("bits", 32) > _ALMOST_ALL
    if whole or options.get("capacity_bits") in (None, _MIDDLE):
        return None, None
    options = {**options, "capacity_bits": _MIDDLE}
    learner, _ = _try(make, replace(sized, table_options=options))
    if learner is None:
        return None, None
    return contend(f"sizes by {_MIDDLE:g} bits a number", learner, winner, observer, step)


def contend(
    name: str,
    learner: Learner,
    winner: Learner,
    observer: Observer,
    step: Callable[[Learner], None],
) -> tuple[Learner | None, dict[str, Any]]:
    """Trains a fresh learner to its end, or until it is hopelessly behind.

    Args:
        name: of the learner, in its row and the progress bar.
        learner: fresh.
        winner: the best model so far, trained to its end.
        observer: is told how it goes.
        step: takes one step of a learner.

    Returns:
        The learner if it validates better in AUC and in AUC minus log loss, and its row.
    """
    horizon = 2 * learner.steps_per_epoch
    mark = max((r["score"] for r in winner.history if r["step"] <= horizon), default=-math.inf)
    observer.begin(name, learner.steps_per_epoch * learner.config.epochs, 0)
    while not learner.finished:
        step(learner)
        if learner.steps == horizon and _best(learner)["score"] < mark - _HOPELESS:
            break
    row, rival = outcome(name, learner), _best(winner)
    row["chosen"] = row["score"] > rival["score"] and row["val_auc"] >= rival["val_auc"]
    return (learner if row["chosen"] else None), row


def run_to_end(
    name: str, learner: Learner, observer: Observer, step: Callable[[Learner], None]
) -> None:
    """Trains a learner until it is finished, under a bar of its own."""
    observer.begin(name, learner.steps_per_epoch * learner.config.epochs, 0)
    try:
        while not learner.finished:
            step(learner)
    finally:
        observer.end()


def _run(learner: Learner, epochs: int, step: Callable[[Learner], None]) -> None:
    while learner.steps < epochs * learner.steps_per_epoch and not learner.finished:
        step(learner)


def _made(
    entries: Mapping[str, TrainConfig], make: Callable[[TrainConfig], Learner]
) -> tuple[dict[str, Learner], UserError | None]:
    """Fresh learners of those settings that fit the table and the budget, and the last refusal."""
    learners, refused = {}, None
    for name, entry in entries.items():
        learner, error = _try(make, entry)
        if learner is None:
            refused = error
        else:
            learners[name] = learner
    return learners, refused


def _try(
    make: Callable[[TrainConfig], Learner], config: TrainConfig
) -> tuple[Learner | None, UserError | None]:
    try:
        return make(config), None
    except UserError as error:
        return None, error


def _rungs(count: int) -> list[int]:
    """How many candidates train in the first epoch, the second, ...: halved down to two."""
    rungs = [count]
    while rungs[-1] > 2:
        rungs.append((rungs[-1] + 1) // 2)
    return rungs


def outcome(name: str, learner: Learner) -> dict[str, Any]:
    """What a learner has come to, as a row of `Raced.table` that is not chosen."""
    best = _best(learner)
    keys = ("score", "val_auc", "val_logloss", "stored_bytes")
    return {
        "name": name,
        "epochs": round(learner.epochs, 2),
        **{key: best[key] for key in keys},
        "chosen": False,
    }


def _best(learner: Learner) -> dict[str, Any]:
    if learner.best is None:
        return {"score": -math.inf, "val_auc": None, "val_logloss": None, "stored_bytes": None}
    record: dict[str, Any] = learner.best["record"]
    return record
