"""Contenders: what is trained to its end against the best model so far, on validation.

Fewer and fewer bytes, labels that a teacher softens, another law of the count, and the weight decay
and dropout that serve a table of full size. Which of them a run tries, and when, is for
`amtl.run.contest` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.metrics import score_error
from amtl.run.race import ALMOST_ALL, MIDDLE, Trials, attempt, best_record, outcome

_NEAR = 0.01
"""In AUC minus log loss: a model of fewer bytes that misses by less is no reason to stop there."""

LESS = 0.3
"""Of the best model's bytes: tried too, because fewer numbers may overfit less."""

DROPOUT = 0.1
"""Share of the embeddings' numbers zeroed in training, where that is tried."""

DECAY = 1e-4
"""Weight decay of a table's numbers that serves most data."""

DECAYS = (1e-5, DECAY)
"""Weight decays that are tried: on each of six sets one of them served a full table, and on two of
these the smaller one was worse than none. On 14 files more none was never the best where the larger
one was better than the smaller one."""

STRONGER = (1e-3, 1e-2)
"""Tried one after the other, while more is better than less: numbers beside embeddings are learned
late, when values of few rows are long known by heart."""

WEAKER = 0.1
"""Of a full table's weight decay: tried of a table of few numbers, which it may be too much for,
and beside dropout."""

SHARES = (0.5, 0.8)
"""Of the labels, a teacher's: data of few or noisy clicks gain by the larger one."""

SURELY = 1.0
"""Standard errors of the difference on validation: fewer bytes have to be so much better, and all
bytes with a teacher may be so much worse. Where few clicks are held out, the best of a dozen models
is the luckiest, and a small table has lost most where it was luck."""

_Way = tuple[float | None, float]
"""Weight decay and dropout."""

_HOPELESS = 0.02
"""So far behind after two laps, in AUC minus log loss, nothing has been seen to catch up but by
more weight decay; from .012 behind a table of few numbers, which learns for longer, won by .02."""


def regularised(
    config: TrainConfig,
    train: Callable[[TrainConfig], float],
    trained: bool = False,
    trials: Trials | None = None,
) -> TrainConfig:
    """The best of `config`, and of it with weight decay and dropout where it leaves these open.

    Less decay than that which serves most data is no better, or none at all is tried. Dropout comes
    with the decay that is best: five trainings at most.

    Args:
        config: settings.
        train: trains with settings and returns a score.
        trained: whether it knows that of `config` without training.
        trials: are told of what `train` will likely be asked for.
    """
    best, score = config, -math.inf
    expected: list[TrainConfig] = []

    def expect(**changes: float | None) -> None:
        if trials is not None:
            expected.append(replace(best, **changes))  # type: ignore[arg-type]
            trials.expect(expected[-1])

    def improve(**changes: float | None) -> float:
        nonlocal best, score
        entry = replace(best, **changes)  # type: ignore[arg-type]
        other = train(entry)
        if other > score:
            best, score = entry, other
            if drops and changes:
                # The last to be asked for, if nothing is better still.
                expect(embedding_dropout=DROPOUT)
        return other

    decays = config.embedding_decay is None and config.may_decay
    drops = config.embedding_dropout is None
    if trained or not decays:
        improve()
    if decays:
        for decay in reversed(DECAYS):
            expect(embedding_decay=decay)
        last, less = (improve(embedding_decay=decay) for decay in reversed(DECAYS))
        if last <= less and trials is not None:
            trials.forget(*likely_regularised(config))
        if last > less:
            for decay in STRONGER:
                expect(embedding_decay=decay)
            for decay in STRONGER:
                before, last = last, improve(embedding_decay=decay)
                if last <= before:
                    break
        elif not trained:
            improve(embedding_decay=None)
    if drops:
        improve(embedding_dropout=DROPOUT)
    if trials is not None:
        trials.forget(*expected)
    return best


def likely_regularised(config: TrainConfig) -> list[TrainConfig]:
    """What `regularised` trains: the first two surely where decay is open, the third mostly."""
    if config.embedding_decay is None and config.may_decay:
        decays = (*reversed(DECAYS), STRONGER[0])
        return [replace(config, embedding_decay=decay) for decay in decays]
    return [config]


def titled(name: str, entry: TrainConfig) -> str:
    """A name for the progress bar, which tells settings of `regularised` apart."""
    if entry.embedding_decay:
        name = f"{name}, weight decay {entry.embedding_decay:g}"
    return f"{name}, dropout {entry.embedding_dropout:g}" if entry.embedding_dropout else name


def race_bytes(
    sized: TrainConfig,
    winner: Learner,
    used: float,
    trials: Trials,
    weaker: bool = False,
) -> tuple[Learner | None, dict[str, Any] | None]:
    """Trains with fewer and fewer bytes, the budget being a limit and no aim.

    Until that is twice in a row no better, or far from it: a step may only remove what overfits.
    What keeps many numbers from overfitting may be too much for few: weaker weight decay is tried,
    too, where that is near, and kept from where it is better.

    Args:
        sized: settings of the best candidate whose rows differ in width.
        winner: the best model so far, trained to its end.
        used: share of the full table's bytes that it stores.
        trials: by what learners are made and trained.
        weaker: whether weaker weight decay than the settings', if they have some, may be tried.

    Returns:
        The best model of fewer bytes that validates better, and its row with the winner's under
        `rival`; the row of the first one tried if none does; nothing where no size fits.
    """
    rival, best, row = outcome("the best before", winner), None, None
    share, missed = min(used, sized.budget), False
    expected: list[TrainConfig] = []

    def tries(entry: TrainConfig) -> tuple[Learner | None, dict[str, Any]] | None:
        learner, _ = attempt(trials, entry)
        if learner is None:
            return None
        name = f"{100 * share:.2g}% of the bytes"
        if entry.embedding_decay != winner.config.embedding_decay:
            name += f", weight decay {entry.embedding_decay:g}"
        better, tried = contend(name, learner, best or winner, trials, SURELY)
        if better is None:
            learner.release()
        return better, tried

    # A table that stores nothing has nothing to leave out.
    while share and not trials.late():
        share *= LESS
        expected = [replace(sized, budget=each) for each in (share, share * LESS)]
        trials.expect(*expected)
        found = tries(replace(sized, budget=share))
        if found is None:
            break
        better, tried = found
        near = best_record(best or winner)["score"] - _NEAR
        decay = 0.0 if not weaker or trials.late() else sized.embedding_decay
        if decay and tried["score"] >= near:
            other = replace(sized, budget=share, embedding_decay=WEAKER * decay)
            found = tries(other)
            if found is not None and _standing(*found) > _standing(better, tried):
                sized, weaker = other, False
                found, (better, tried) = (better, tried), found
            if found is not None and found[0] is not None:
                found[0].release()
        if row is None or better is not None:
            row = {**tried, "rival": rival}
        if better is None:
            if missed or tried["score"] < near:
                break
            missed = True
            continue
        if best is not None:
            best.release()
        best, missed = better, False
    trials.forget(*expected)
    return best, row


def _standing(better: Learner | None, tried: Mapping[str, Any]) -> tuple[bool, float]:
    """By which results of `contend` against one winner are held against each other."""
    return better is not None, tried["score"]


def race_taught(
    winner: Learner,
    trials: Trials,
    decay: float | None = None,
    config: TrainConfig | None = None,
    sure: float = 0.0,
) -> tuple[Learner | None, list[dict[str, Any]]]:
    """Trains settings anew on labels that a teacher softens, against a winner; see `contend`.

    Weight decay and dropout both keep rows from overfitting, and together they may be too much:
    what decay serves a table of full size comes without dropout, a tenth of it and none with some.
    Then how much the teacher says, and last the best of all with the other dropout.

    Args:
        winner: the best model so far, trained to its end.
        trials: by what learners are made, which have the teacher's labels, and trained.
        decay: what serves a table of full size; tried here where the settings leave it open.
        config: settings to train with; None: the winner's.
        sure: see `contend`; by how much the first of them has to beat the winner.

    Returns:
        The best of them if it validates better, and their rows.
    """
    config, best = config or winner.config, None
    rows: list[dict[str, Any]] = []
    expected: list[TrainConfig] = []
    given, share = config.embedding_dropout, config.distillation
    shares: tuple[float, ...] = SHARES if share is None else (share,)

    def entry(share: float, way: _Way) -> TrainConfig:
        changes: dict[str, Any] = {"embedding_decay": way[0], "embedding_dropout": way[1]}
        return replace(config, distillation=share, **changes)

    def expect(share: float, *ways: _Way, later: bool = False) -> None:
        expected.extend(entry(share, way) for way in ways)
        trials.expect(*expected[-len(ways) :], later=later)

    def teach(share: float, way: _Way) -> float:
        nonlocal best
        each, dropout = way
        if rows and trials.late():
            return -math.inf
        learner = trials.make(entry(share, way))
        title = f"{share:.0%} of the labels a teacher's"
        title += f", weight decay {each:g}" if each and each != config.embedding_decay else ""
        title += f", dropout {dropout:g}" if dropout and given is None else ""
        needed = sure if best is None else 0.0
        better, row = contend(title, learner, best or winner, trials, needed)
        if better is None:
            learner.release()
        else:
            for other in rows:
                other["chosen"] = False
            if best is not None:
                best.release()
            best = better
        rows.append(row)
        return float(row["score"])

    def dropped(way: _Way) -> _Way:
        """The same decay, with dropout if it had none, and without if it had some."""
        return way[0], 0.0 if way[1] else DROPOUT

    some = DROPOUT if given is None else given
    tried = dict[_Way, float]()
    none: _Way = (config.embedding_decay, some)
    if config.embedding_decay is None and decay and config.may_decay:
        full, weaker = (decay, given or 0.0), (WEAKER * decay, some)
        expect(shares[0], full, weaker)
        expect(shares[0], none, later=True)
        tried = {way: teach(shares[0], way) for way in (full, weaker)}
    if not tried or max(tried, key=tried.__getitem__) == weaker:
        for share in shares[1:]:
            expect(share, weaker if tried else none, later=True)
        tried[none] = teach(shares[0], none)
    way = max(tried, key=tried.__getitem__)
    trials.forget(*(entry(share, other) for share in shares for other in tried if other != way))
    for share in shares[1:]:
        expect(share, way)
    if none not in tried:
        expect(shares[0], none)
    if given is None:
        for share in reversed(shares):
            expect(share, dropped(way), later=True)
    by_share = {shares[0]: tried[way]}
    for share in shares[1:]:
        by_share[share] = teach(share, way)
    share = max(by_share, key=by_share.__getitem__)
    # A tenth being worse says nothing of none.
    if none not in tried and teach(share, none) > by_share[share]:
        way = none
    if given is None:
        teach(share, dropped(way))
    trials.forget(*expected)
    return best, rows


def middle_law(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of a table with the middle one of the laws, None where they have it or no law."""
    if options.get("capacity_bits") in (None, MIDDLE):
        return None
    return {**options, "capacity_bits": MIDDLE}


def race_law(
    sized: TrainConfig, winner: Learner, trials: Trials
) -> tuple[Learner | None, dict[str, Any] | None]:
    """Trains with the middle one of the laws where another, or a fixed width, has won.

    See `contend`. One epoch, after which a race lets the worse half go, tells little of laws.

    Args:
        sized: the winner's settings with sizes of the best candidate whose rows differ in width.
        winner: the best model so far, trained to its end.
        trials: by what learners are made and trained.

    Returns:
        The learner if it validates better, and its row; nothing where there is no other law.
    """
    if trials.late():
        return None, None
    options = {**sized.table_options, "capacity_bits": MIDDLE}
    whole = sized.budget * 32 / options.get("bits", 32) > ALMOST_ALL
    if whole or middle_law(winner.config.table_options) is None:
        return None, None
    learner, _ = attempt(trials, replace(sized, table_options=options))
    if learner is None:
        return None, None
    better, row = contend(f"sizes by {MIDDLE:g} bits a number", learner, winner, trials)
    if better is None:
        learner.release()
    return better, row


def contend(
    name: str, learner: Learner, winner: Learner, trials: Trials, sure: float = 0.0
) -> tuple[Learner | None, dict[str, Any]]:
    """Trains a fresh learner to its end, or until it is hopelessly behind, or the time is up.

    One with more weight decay than the winner, or hidden values, has its time: it learns more
    slowly and for longer, and from .025 behind has gone on to win.

    Args:
        name: of the learner, in its row and the progress bar.
        learner: fresh.
        winner: the best model so far, trained to its end.
        trials: by what it is trained.
        sure: standard errors of the difference by which it has to validate better; negative: by
            which it may validate worse, then also in AUC alone.

    Returns:
        The learner if it validates better in AUC and in the score of both, and its row.
    """
    horizon = learner.lap_end(2)
    mark = max((r["score"] for r in winner.history if r["step"] <= horizon), default=-math.inf)
    slower = (learner.config.embedding_decay or 0.0) > (winner.config.embedding_decay or 0.0)
    if slower or (learner.config.hides and not winner.config.hides):
        mark = -math.inf
    trials.observer.begin(name, learner.steps_per_epoch * learner.config.epochs, 0)
    trials.train(learner, horizon)
    behind = best_record(learner)["score"] < mark - _HOPELESS
    hopeless = behind and learner.steps == horizon and not learner.finished
    if not hopeless:
        trials.train(learner)
    row, rival = outcome(name, learner), best_record(winner)
    lead = row["score"] - rival["score"]
    if sure and not hopeless and not math.isinf(lead):
        val = learner.task.val
        lead -= sure * score_error(learner.says(), winner.says(), val.labels, val.weights)
    row["chosen"] = lead > 0 and (sure < 0 or row["val_auc"] >= rival["val_auc"])
    return (learner if row["chosen"] else None), row


def run_to_end(name: str, learner: Learner, trials: Trials) -> None:
    """Trains a learner until it is finished, or the time is up, under a bar of its own."""
    trials.observer.begin(name, learner.steps_per_epoch * learner.config.epochs, 0)
    try:
        trials.train(learner)
    finally:
        trials.observer.end()
