"""Models trained to their end against each other on validation: fewer bytes, and with a teacher.

What a race at the start cannot tell after an epoch or three. Every contender may take the winner's
place; the labels that finished models soften are one of them (`amtl.run.teaching`). With a teacher
all of the bytes come first again: fewer of them keep rows from overfitting, which a teacher and
weight decay do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.metrics import score_error
from amtl.run.race import (
    ALMOST_ALL,
    FULL,
    MIDDLE,
    Trials,
    attempt,
    best_record,
    has_law,
    is_open,
    outcome,
    plain,
)
from amtl.run.teaching import Teacher

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

_MORE = (8, 25)
"""Times that of the first model is what the others took, on the sets that settings come from."""

_SIDE_BY_SIDE = 0.6
"""To this power of the trainings at once a run is faster: some wait for each other."""

_Way = tuple[float | None, float]
"""Weight decay and dropout."""

_HOPELESS = 0.02
"""So far behind after two laps, in AUC minus log loss, nothing has been seen to catch up but by
more weight decay; from .012 behind a table of few numbers, which learns for longer, won by .02."""


def untried(config: TrainConfig) -> TrainConfig:
    """`config` with some weight decay, if it leaves that open and nothing will ever try any.

    What others are held against stays as it is: tables of full size, methods of the field, and the
    paper's own layer.
    """
    ours = config.method in ("amtl", "rule")
    ours = ours and config.table_options.get("parametrization") != "free"
    tried = is_open(config) or config.distillation
    if not ours or tried or config.embedding_decay is not None or not config.may_decay:
        return config
    return replace(config, embedding_decay=DECAY)


class Contest:
    """What follows when the first model of a run is trained to its end.

    Args:
        first: that model.
        trials: by what learners are made and trained.

    Attributes:
        winner: the model that validates best so far.
        found: rows of what was tried, None or nothing where it was not: `less` bytes, the `full`
            table (its `error` is that of the difference to the winner's score), `taught`, another
            `law`, less bytes with a teacher (`less_taught`), and first of all, where time is
            limited, the first model with weight decay (`decayed`); and the best model with values
            `hidden` as unseen ones, last of all, or where time is limited right after that.
        full: the best table of full size, ended, if the run is to be compared with it and there
            was time for all of them.
    """

    def __init__(self, first: Learner, trials: Trials) -> None:
        self.first = self.winner = first
        self.found: dict[str, Any] = {
            "less": None,
            "full": None,
            "taught": [],
            "law": None,
            "less_taught": None,
            "decayed": None,
            "hidden": None,
        }
        self.full: Learner | None = None
        self._decay: float | None = None
        self._full_says = torch.empty(0)
        self._trials = trials

    def run(self, raced: Mapping[str, Any] | None) -> None:
        """Tries all that the settings leave open.

        Args:
            raced: of the race at the start, `sized` and `given` options of the table and the
                `budget`; None where there was none, so that sizes are settled.
        """
        labels = self._run(raced)
        if raced is not None:
            self._hidden(labels)
        self.winner = self._trials.whole(self.winner)
        full = self.found["full"]
        if full is not None:
            labels = self.winner.task.val.labels
            full["error"] = score_error(self._full_says, self.winner.says(), labels)

    def _run(self, raced: Mapping[str, Any] | None) -> Tensor | None:
        """Tries all but hidden values; returns labels for those to come if there is a teacher."""
        share = self.first.config.distillation
        options: dict[str, Any] = {}
        fewer = False
        if raced is not None:
            if math.isfinite(self._trials.left()):
                self._decayed()
                self._hidden()
            whole = self.winner
            options = self._fewer_bytes("less", raced, raced["sized"])
            fewer = self.winner is not whole
        if share == 0 or (share is None and raced is None) or self._trials.late():
            return None
        if raced is not None:
            self._announce()
        labels = self._teach(fewer)
        if raced is None or labels is None or not self.winner.config.distillation:
            return labels
        options = self._law(raced, options, labels)
        if fewer:
            self._fewer_bytes("less_taught", raced, options, labels)
        return labels

    def _decayed(self) -> None:
        """Tries the first model with weight decay: most of what all the rest would gain.

        Of 27 files it made full tables better on 23. What comes later would find it too, but after
        fewer bytes and full tables. How long those take nobody knows: of a shop's log, first
        trained in 3 seconds, two minutes were over before.
        """
        config = self.first.config
        if config.embedding_decay is not None or not config.may_decay or self._trials.late():
            return
        decayed = replace(config, embedding_decay=DECAY)
        learner = self._trials.make(decayed)
        better, row = contend(titled("the same", decayed), learner, self.winner, self._trials)
        self.found["decayed"] = row
        if better is None:
            learner.release()
        self._prefer(better)

    def _hidden(self, labels: Tensor | None = None) -> None:
        """Tries the best model so far with values taken as unseen, see `amtl.run.unseen.Hiding`.

        Where what else rows hold tells enough of new items, or ids are learned by heart, that is
        worth up to .01 of AUC; where single ids tell most, it costs .002.

        Args:
            labels: with the predictions of a teacher mixed in, for a model that has one.
        """
        config, before = self.winner.config, self.found["hidden"]
        lost = before is not None and not before["chosen"]
        if lost or config.hides is not None or self._trials.late() or not self.winner.may_hide:
            return
        taught = bool(config.distillation)
        if taught and labels is None:
            return
        trials = self._trials.taught(labels) if taught and labels is not None else self._trials
        learner = trials.make(replace(config, hides=True))
        name = titled("the same, values hidden", config)
        better, self.found["hidden"] = contend(name, learner, self.winner, trials)
        if better is None:
            learner.release()
        self._prefer(better)

    def _announce(self) -> None:
        """Says how long the rest may take, where that is longer than a bar tells."""
        minutes = sum(record["seconds"] for record in self.first.history) / 60
        if self._trials.ahead is not None:
            minutes /= self._trials.ahead.jobs**_SIDE_BY_SIDE
        least, most = (minutes * times for times in _MORE)
        left = self._trials.left() / 60
        if least <= 1:
            return
        if left < most:
            why = f"{left:.1f} minutes, until --time-limit; all take {least:.0f} to {most:.0f}"
        else:
            why = (
                f"{least:.0f} to {most:.0f} minutes more (--time-limit ends that when you say, "
                "--no-race and --distillation 0 go without)"
            )
        self._trials.observer.note(f"trained once; others are tried for {why}")

    def _teach(self, fewer: bool) -> Tensor | None:
        """Trains the first model's settings with a teacher and returns labels for those to come.

        None where the time is up before they are needed.

        Args:
            fewer: whether the best model so far is one of fewer bytes.
        """
        teacher = self._teacher()
        if self._trials.late():
            return None
        best, self.found["taught"] = race_taught(
            self.winner,
            self._trials.taught(teacher.labels()),
            self._decay,
            self.first.config,
            sure=-SURELY if fewer else 0.0,
        )
        if best is not None:
            teacher.add(best)
        self._prefer(best)
        return teacher.labels()

    def _law(
        self, raced: Mapping[str, Any], options: dict[str, Any], labels: Tensor
    ) -> dict[str, Any]:
        """Tries another law and returns the options by which sizes follow from counts."""
        if has_law(raced["given"]):
            return options
        sized = replace(self.winner.config, table_options=options)
        trials = self._trials.taught(labels)
        best, self.found["law"] = race_law(sized, self.winner, trials)
        self._prefer(best)
        if best is None:
            return options
        if self.first.config.distillation is None:
            self._other_shares(trials)
        return best.config.table_options

    def _other_shares(self, trials: Trials) -> None:
        """How much the teacher says was settled by another law than the winner's: asked again."""
        config = self.winner.config
        law = config.table_options["capacity_bits"]
        for share in SHARES:
            if share == config.distillation or trials.late():
                continue
            other = replace(config, distillation=share)
            best, rows = race_taught(self.winner, trials, config=other)
            self.found["taught"] += [
                {**row, "name": f"{row['name']}, {law:g} bits a number"} for row in rows
            ]
            self._prefer(best)

    def _fewer_bytes(
        self,
        name: str,
        raced: Mapping[str, Any],
        options: dict[str, Any],
        labels: Tensor | None = None,
    ) -> dict[str, Any]:
        """Tries fewer bytes, sizes following from counts by `options`.

        By the middle law, too, where fewer bytes do no better by another: a law that won with all
        the bytes may leave the wrong rows nothing with few.

        Returns:
            The options by which fewer bytes did better, or those given.
        """
        trials = self._trials if labels is None else self._trials.taught(labels)
        laws = [options]
        middle = middle_law(options)
        if middle is not None and not has_law(raced["given"]):
            laws.append(middle)
        for law in laws:
            if trials.late():
                break
            winner = self.winner
            sized = replace(winner.config, table_options=law, budget=raced["budget"])
            assert winner.best is not None
            used = winner.best["record"]["stored_bytes"] / methods.dense_bytes(self.first.table)
            weaker = self.first.config.embedding_decay is None
            best, self.found[name] = race_bytes(sized, winner, used, trials, weaker)
            self._prefer(best)
            if best is not None:
                return law
        return options

    def _teacher(self) -> Teacher:
        """The models there are, and tables of full size trained to their end.

        One of them may overfit, and a teacher of several says more than any of them. Of a fixed
        table nobody knows how wide it could be: the default width, if that is more.
        """
        teacher = Teacher(self._trials.says_of_train)
        rows: list[tuple[dict[str, Any], Tensor]] = []
        teacher.add(self.first)
        if self.winner is not self.first:
            teacher.add(self.winner)
        alone, full = alone_and_full(self.first.config)

        def train(entry: TrainConfig) -> float:
            if rows and self._trials.late():
                return -math.inf
            if entry == alone:
                rows.append((outcome(FULL, self.first), self.first.says()))
                return float(rows[-1][0]["score"])
            table = self._trials.make(entry)
            run_to_end(titled(FULL, entry), table, self._trials)
            teacher.add(table)
            rows.append((outcome(FULL, table), table.says()))
            self._keep(table)
            return float(rows[-1][0]["score"])

        best = regularised(full, train, full == alone, self._trials)
        self.found["full"], self._full_says = max(rows, key=lambda row: row[0]["score"])
        self._decay = best.embedding_decay
        if self.full is not None and self._trials.late():
            # What it is compared with is the best of all that were to be trained, to their end.
            self.full.release()
            self.full = None
        return teacher

    def _keep(self, table: Learner) -> None:
        """Keeps the best of the full tables where it is compared with, and its settings are."""
        kept, config = self.full, self.first.config
        compared = config.compare and config.method != "fixed"
        worse: Learner | None = table
        if compared and (kept is None or best_record(table)["score"] > best_record(kept)["score"]):
            self.full, worse = table, kept
        if worse is not None:
            worse.release()

    def _prefer(self, better: Learner | None) -> None:
        if better is None:
            return
        if self.winner is not self.first:
            self.winner.release()
        self.winner = better


def alone_and_full(config: TrainConfig) -> tuple[TrainConfig, TrainConfig]:
    """The settings without a teacher, and those of the table of full size that may be one."""
    alone = replace(config, distillation=None, race=False)
    full = plain(alone)
    if alone.method == "fixed" and alone.dim < TrainConfig.dim:
        # Rows to start warm from are as narrow.
        full = replace(full, dim=TrainConfig.dim, warm_start=None)
    return alone, full


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
        lead -= sure * score_error(learner.says(), winner.says(), learner.task.val.labels)
    row["chosen"] = lead > 0 and (sure < 0 or row["val_auc"] >= rival["val_auc"])
    return (learner if row["chosen"] else None), row


def run_to_end(name: str, learner: Learner, trials: Trials) -> None:
    """Trains a learner until it is finished, or the time is up, under a bar of its own."""
    trials.observer.begin(name, learner.steps_per_epoch * learner.config.epochs, 0)
    try:
        trials.train(learner)
    finally:
        trials.observer.end()
