"""Models trained to their end against each other on validation: fewer bytes, and with a teacher.

What a race at the start cannot tell after an epoch or three. Every contender may take the winner's
place; the labels that finished models soften are one of them (`amtl.run.teaching`). With a teacher
all of the bytes come first again: fewer of them keep rows from overfitting, which a teacher and
weight decay do better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.contenders import (
    DECAY,
    SHARES,
    SURELY,
    contend,
    middle_law,
    race_bytes,
    race_law,
    race_taught,
    regularised,
    run_to_end,
    titled,
)
from amtl.run.learner import Learner
from amtl.run.metrics import score_error
from amtl.run.race import FULL, Trials, best_record, has_law, is_open, outcome, plain
from amtl.run.teaching import Teacher

_MORE = (8, 25)
"""Times that of the first model is what the others took, on the sets that settings come from."""

_SIDE_BY_SIDE = 0.6
"""To this power of the trainings at once a run is faster: some wait for each other."""


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
            val, says = self.winner.task.val, self.winner.says()
            full["error"] = score_error(self._full_says, says, val.labels, val.weights)

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
        trials = self._trials
        if config.distillation:
            if labels is None:
                return
            trials = trials.taught(labels)
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
