"""The training job: from settings to a trained model, its metrics and its files.

A run folder holds `config.json`, `vocabulary.safetensors` (fields and vocabularies as fitted),
`checkpoint.safetensors` (everything needed to go on), `best.safetensors` (the best model
so far) and, at the end, `metrics.json`.
"""

from __future__ import annotations

import contextlib
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amtl.data.encoding import Encoder
from amtl.data.registry import Source, load_source
from amtl.errors import UserError
from amtl.run import folders, methods
from amtl.run.ahead import Ahead, side_by_side
from amtl.run.comparison import train_baselines
from amtl.run.config import TrainConfig
from amtl.run.contenders import likely_regularised
from amtl.run.contest import Contest, alone_and_full
from amtl.run.done import CHECKPOINT_SECONDS, FIRST, FULL, Done, Interrupted
from amtl.run.earlier import Earlier
from amtl.run.learner import Learner, Task
from amtl.run.memory import require_memory
from amtl.run.metrics import auc, auc_error, log_loss
from amtl.run.model import predict
from amtl.run.preparation import held, prepare, scarce, split_counts
from amtl.run.progress import Observer, Silent
from amtl.run.race import Trials, is_open, race
from amtl.run.searching import is_search, search
from amtl_kernels import __version__

_BINS = 40
_RACED_LATER = ("embedding_dropout", "embedding_decay", "distillation", "hides")
"""Settings that models trained to their end decide."""


_SURELY = 3.0
"""Standard errors of an AUC, by which two splits of the same kind hardly ever differ."""


def title(config: TrainConfig) -> str:
    """A run in a few words."""
    budget = config.effective_budget
    share = "" if budget is None else f" {100 * budget:.3g}%"
    return f"{config.method} D={config.dim}{share}"


class Trainer:
    """Trains one model; can stop at any step and go on as if it had not.

    Args:
        config: settings.
        task: encoded data.
        out: run folder, or None to keep nothing on disk.
        observer: is told how it goes.
        stop: asked after every step with the number of steps done; True stops the run with a
            checkpoint.
        time_limit: seconds of `run` after which nothing is tried or trained any more, so that the
            best model until then is the result; see `Trials.late`. None for all the time it takes.
        jobs: trainings side by side, each with its part of torch's threads; None for as many as
            there are threads, cores and memory for, see `side_by_side`.

    Attributes:
        cut_short: whether that limit ended training, or what is tried after it.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        out: Path | None = None,
        observer: Observer | None = None,
        stop: Callable[[int], bool] | None = None,
        time_limit: float | None = None,
        jobs: int | None = 1,
    ) -> None:
        asked, whole = config.budget_bytes, task.encoder.num_rows * config.dim * 4
        config = config.with_rows(task.encoder.num_rows)
        self.config = config
        self.task = task
        self.out = out
        earlier = task.earlier
        if out is not None and earlier is not None and out.resolve() == earlier.folder.resolve():
            raise UserError(
                f"--out {out} would replace the run that --warm-start goes on from: choose another"
            )
        self.observer: Observer = observer or Silent()
        if asked is not None and asked >= whole and config.effective_budget is not None:
            self.observer.note(
                f"--budget {asked:,} bytes: a table of 32 bits has {whole:,}, so it may keep all"
            )
        splits = {"val": task.val, "test": task.test}
        self.held_out = {name: held(data.labels, data.weights) for name, data in splits.items()}
        for line in scarce(self.held_out):
            self.observer.note(line)
        self.stop = stop or (lambda steps: False)
        self.time_limit = math.inf if time_limit is None else time_limit
        self._deadline, self.cut_short = math.inf, False
        size = task.encoder.num_rows, len(task.encoder.fields)
        require_memory(config, *size)
        self.jobs = side_by_side(jobs, config, *size)
        self._ahead: Ahead | None = None
        # A race makes its own learners; this one finds mistakes before anything is written, but for
        # bits, which may fit nothing here and are then raced without.
        raced = config.raced_bits and is_open(config)
        self.learner = self._make(replace(config, bits="32") if raced else config)
        if earlier is not None:
            rows = len(earlier.matched(task.encoder)[0])
            rest = "; the rest of the model begins anew, for its shape is another"
            rest = "" if earlier.fits(self.learner.model) else rest
            self.observer.note(f"warm start: {rows:,} rows from {earlier.folder}{rest}")
        self.raced: dict[str, Any] | None = None
        self._full: Learner | None = None
        self._saved_at = time.monotonic()
        self._best_saved = -1
        self._fresh = True
        self._done: Done | None = None

    def _make(self, config: TrainConfig, taught: Tensor | None = None) -> Learner:
        # Full tables that others are held against begin cold.
        earlier = self.task.earlier if config.warm_start is not None else None
        return Learner(config, self.task, taught=taught, earlier=earlier)

    @property
    def table(self) -> nn.Module:
        """The embedding."""
        return self.learner.table

    @property
    def asked(self) -> TrainConfig:
        """Settings that the run was asked for, before a race settled some."""
        raced = self.raced or {}
        if "asked" not in raced:
            return self.config
        given = {"budget": raced["budget"], "table_options": raced["given"], **raced["asked"]}
        return replace(self.config, race=True, **given)

    def run(self) -> dict[str, Any]:
        """Races settings, trains until early stopping, restores the best model, tests it once.

        Returns:
            The metrics, also written to `metrics.json`.

        Raises:
            Interrupted: if `stop` asked for it.
        """
        with contextlib.ExitStack() as self._holds:
            return self._run_side_by_side()

    def _run_side_by_side(self) -> dict[str, Any]:
        config, threads = self.config, torch.get_num_threads()
        if self.jobs == 1 or not (is_open(config) or config.distillation or config.compare):
            return self._run()
        each = max(1, threads // self.jobs)
        torch.set_num_threads(each)
        try:
            with Ahead(self._make, self.jobs, each) as self._ahead:
                return self._run()
        finally:
            self._ahead = None
            torch.set_num_threads(threads)

    def _run(self) -> dict[str, Any]:
        self._deadline = time.monotonic() + self.time_limit
        if self._fresh:
            if self.config.distillation and is_search(self.learner.table):
                raise UserError(
                    f"--method {self.config.method} trains twice by itself and takes no teacher: "
                    f"leave --distillation out"
                )
            self._require_room()
        if self.out:
            self._holds.enter_context(folders.held(self.out))
        if self._fresh:
            self._begin()
        if self.learner.steps == 0 and is_open(self.config):
            if self.config.distillation != 0:
                # It takes longest, and waits for nothing.
                full = likely_regularised(alone_and_full(self.config)[1])
                self._trials().expect(*full, later=True)
            self._race()
        if is_search(self.learner.table):
            self._search()
        learner, config = self.learner, self.config
        if self.task.earlier is not None and learner.goes_on and learner.steps == 0:
            self._note_start(self.task.earlier)
        total = learner.steps_per_epoch * config.epochs
        self.observer.begin(title(config), total, learner.steps)
        if learner.frozen and methods.is_adaptive(learner.table):
            self._note_freeze()
        try:
            replace(self._trials(), step=lambda learner: self._step(), done=None).train(learner)
        finally:
            self.observer.end()
        # Without a valid AUC there is nothing to go on from, which the end then says.
        contends = self.raced is not None or bool(self.config.distillation)
        contends = contends and "less" not in (self.raced or {}) and self.learner.best is not None
        self.cut_short = self._late() and (contends or not learner.finished)
        if contends and not self.cut_short:
            self._contend()
            self.cut_short = self._late()
        elif self.cut_short:
            # Resuming goes on from here, with more time.
            self.save()
        return self._finish()

    def _late(self) -> bool:
        return self._left() <= 0

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _require_room(self) -> None:
        """Refuses a budget in which a table can only be empty."""
        share, whole = self.config.effective_budget, methods.dense_bytes(self.table)
        if share is None or methods.stored_bytes(self.table):
            return
        # Rows of one count are equally wide: what a number is too few for by one law may do by
        # another, which a race tries.
        if is_open(self.config) and share * whole >= 4:
            return
        raise UserError(
            f"--budget {share:g} is {share * whole:.0f} of {whole:,} bytes, too few for a number "
            "in any row: choose a larger one"
        )

    def _race(self) -> None:
        """Lets candidates for the open settings run against each other; the best one goes on."""
        given = self.config.table_options
        # Nobody trains it any more, and candidates need the room.
        self.learner.release()
        try:
            again = self._trials("the start (a race is run again)")
            result = race(self.config, replace(again, done=None))
        finally:
            self.observer.end()
        self.config, self.learner = result.config, result.learner
        self.raced = {
            "table": result.table,
            "evidence": result.evidence,
            "sized": result.sized.table_options,
            "budget": self.config.budget,
            "given": given,
            "asked": {name: getattr(self.config, name) for name in _RACED_LATER},
        }
        self._begin()
        self.save()

    def _search(self) -> None:
        """Lets a method that trains twice find what it trains with."""
        try:
            again = self._trials("the start (a search is run again)")
            self.learner = search(self.learner, replace(again, done=None))
        finally:
            self.observer.end()
        self.save()

    def _contend(self) -> None:
        """Holds the model against others that are trained to their end; the best one stays."""
        contest = Contest(self.learner, self._trials())
        try:
            contest.run(self.raced)
        finally:
            self.observer.end()
        done, late = self._done, self._late()
        if done is not None and late:
            done.keep_as(FIRST, contest.first, raced=self.raced)
        self.raced = {**(self.raced or {}), **contest.found}
        self._full = contest.full
        self.config, self.learner = contest.winner.config, contest.winner
        self._begin(trained=True)
        if done is not None and not late:
            done.clear()
            if contest.full is not None:
                done.keep_as(FULL, contest.full)

    def _trials(self, kept: str = "a checkpoint") -> Trials:
        """Makes and trains learners beside the one that checkpoints hold; `kept` is what does."""
        taken = 0

        def tell(
            epochs: float, loss: float, samples: int, steps: int, records: list[dict[str, Any]]
        ) -> None:
            nonlocal taken
            self.observer.step(epochs, loss, samples, steps)
            for record in records:
                self.observer.score(record)
            taken += steps
            if self.stop(taken):
                raise Interrupted(kept)

        def step(learner: Learner) -> None:
            records = len(learner.history)
            loss, samples = learner.step()
            tell(learner.epochs, loss, samples, 1, learner.history[records:])

        return Trials(
            self._make,
            self.observer,
            step,
            self._left,
            ahead=self._ahead,
            tell=tell,
            done=self._done,
        )

    def _step(self) -> None:
        learner = self.learner
        frozen, records = learner.frozen, len(learner.history)
        loss, samples = learner.step()
        self.observer.step(learner.epochs, loss, samples, 1)
        if len(learner.history) > records:
            self.observer.validation(learner.history[-1])
        if learner.frozen and not frozen:
            self._note_freeze()
        if self.stop(learner.steps):
            self.save()
            raise Interrupted
        old = time.monotonic() - self._saved_at > CHECKPOINT_SECONDS
        if self.out and (old or learner.finished or learner.steps % learner.steps_per_epoch == 0):
            self.save()

    def _note_freeze(self) -> None:
        stored, full = methods.stored_bytes(self.table), methods.dense_bytes(self.table)
        tiers = len(methods.table_parameters(self.table))
        self.observer.note(
            f"sizes frozen: {stored:,} of {full:,} bytes ({stored / full:.1%}), "
            f"{tiers} size tier{'s' if tiers > 1 else ''}"
        )

    def _note_start(self, earlier: Earlier) -> None:
        """Says what the earlier model is worth here, and if that looks as if it knew the rows."""
        val = self.task.val
        says = predict(self.learner.model, val)
        found = auc(says, val.labels, val.weights)
        told = f"as it is {earlier.folder} has a validation AUC of {found:.4f} here"
        if found - earlier.val_auc > _SURELY * auc_error(says, val.labels, val.weights):
            told += (
                f", and had {earlier.val_auc:.4f} in its own training: if it was trained on rows "
                "of these, scores are too good; give it rows that it has not had"
            )
        self.observer.note(told)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""
        return {**self.learner.state(), "raced": self.raced}

    def save(self) -> None:
        """Writes the checkpoint, and the best model if it changed, if there is a run folder."""
        if self.out:
            best = self.learner.best
            if best is not None and best["record"]["step"] != self._best_saved:
                folders.save_checkpoint(self.out, "best", best)
                self._best_saved = best["record"]["step"]
            folders.save_checkpoint(self.out, "checkpoint", self.state())
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Goes back to the state in the run folder; to the start if it was stopped in its race."""
        assert self.out is not None
        if not folders.holds_run(self.out):
            return
        state = folders.load_checkpoint(self.out, "checkpoint")
        if "steps" not in state:
            raise UserError(
                f"{self.out} was begun by an older version, whose training cannot go on here; its "
                f"best model opens and packs as it is, and amtl train --force starts anew"
            )
        self.raced = state.pop("raced")
        self.learner.load_state(state)
        self._fresh = False
        self._done = Done(self.out, resumed=True)
        there = len(self._done)
        first = self._done.named(FIRST, self._make)
        if first is not None:
            self.learner, self.config = first[0], first[0].config
            self.raced = first[1]["raced"]
        full = self._done.named(FULL, self._make)
        self._full = None if full is None else full[0]
        if there:
            self.observer.note("what was trained before it was stopped is not trained again")

    def _begin(self, trained: bool = False) -> None:
        """Begins the run folder anew, with the model that is `trained` already, if it is."""
        if self.out:
            best, states = self.learner.best, {}
            if trained and best is not None:
                states = {"checkpoint": self.state(), "best": best}
                self._best_saved = best["record"]["step"]
            folders.begin_run(self.out, self.config, self.task.encoder, states)
            if not trained:
                self._done = Done(self.out, resumed=False)
        self._fresh = False

    def _finish(self) -> dict[str, Any]:
        self.learner.end()
        calmed = self.learner.calm()
        if (self.learner.round_dense() or calmed) and self.out:
            assert self.learner.best is not None
            folders.save_checkpoint(self.out, "best", self.learner.best)
        logits = predict(self.learner.model, self.task.test)
        result = collect_metrics(self, logits)
        if self.out:
            folders.save_metrics(self.out, result)
        if self.config.compare:
            result["compared"] = self._compare(result)
            if self.out:
                folders.save_metrics(self.out, result)
        if self._done is not None and not self.cut_short:
            self._done.clear()
        return result

    def _compare(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            # The comparison was asked for, and of models half trained it would say nothing.
            self._deadline = math.inf
            says, trials = self.learner.says(), self._trials("the trained model")
            return train_baselines(self.config, metrics, says, trials, self._full)
        finally:
            self.observer.end()


def collect_metrics(trainer: Trainer, test_logits: Tensor) -> dict[str, Any]:
    """The record of a finished run."""
    learner = trainer.learner
    config, encoder, table = trainer.config, trainer.task.encoder, learner.table
    assert learner.best is not None
    best = learner.best["record"]
    labels, weights = trainer.task.test.labels, trainer.task.test.weights
    widths = methods.row_widths(table)
    bits = methods.number_bits(table)
    fields = encoder.row_fields()
    stored_encoder, merged = _as_stored(encoder, table, widths)
    unknown = _unknown(trainer.task, merged)
    by_field = torch.bincount(fields, weights=widths.double(), minlength=len(encoder.names))
    steps = {k: statistics.median(v) * 1e3 if v else None for k, v in learner.step_seconds.items()}
    stored, full = methods.stored_bytes(table), methods.dense_bytes(table)
    result = {
        "method": config.method,
        "dim": config.dim,
        "budget": config.effective_budget,
        "seed": config.seed,
        "weight": config.weight,
        "test_auc": auc(test_logits, labels, weights),
        "test_auc_error": auc_error(test_logits, labels, weights),
        "test_logloss": log_loss(test_logits, labels, weights),
        "val_auc": best["val_auc"],
        "val_logloss": best["val_logloss"],
        "val_score": best["score"],
        "best_epoch": best["epoch"],
        "best_phase": best["phase"],
        "epochs_run": round(learner.epochs, 4),
        "stored_bytes": stored,
        "dense_bytes": full,
        "stored_fraction": stored / full,
        "bits": bits,
        "rows": encoder.num_rows,
        "held_out": trainer.held_out,
        "split_rows": split_counts(trainer.task),
        "mlp_bytes": folders.mlp_bytes(learner.model),
        "bytes_by_field": {
            name: int(b) * bits // 8 for name, b in zip(encoder.names, by_field, strict=True)
        },
        "step_bytes": stored - int(widths.sum()) * bits // 8,
        "rows_by_field": dict(zip(encoder.names, encoder.field_sizes, strict=True)),
        "unknown_test_values": unknown,
        "unused_fields": stored_encoder.unused(),
        "step_ms_median": steps,
        "seconds": sum(r["seconds"] for r in learner.history),
        "sizes": size_summary(encoder, table),
        "history": learner.history,
        "raced": trainer.raced,
        "cut_short": trainer.cut_short,
        "compared": None,
        "config": config.to_dict(),
        "versions": versions(),
    }
    packed, vocabularies = folders.packed_bytes(config, stored_encoder, learner.model, result)
    result["vocabulary_bytes"] = vocabularies
    if not methods.is_peer(table):
        result["packed_bytes"] = packed
    return result


def _as_stored(encoder: Encoder, table: nn.Module, widths: Tensor) -> tuple[Encoder, Tensor]:
    """The encoder as it is stored with a table, and which rows leave it: bool `[num_rows]`.

    Rows of no numbers go to their field's out-of-vocabulary row, as in `folders.renumber`.
    """
    merged = torch.zeros(encoder.num_rows, dtype=torch.bool)
    result = Encoder.from_tensors(*encoder.to_tensors())
    if not methods.is_adaptive(table):
        return result, merged
    fields = encoder.row_fields()
    shared = torch.tensor(
        [int(encoder.field_rows(f)[v.oov_row]) for f, v in enumerate(encoder.vocabularies)]
    )
    merged = widths.cpu() == 0
    merged[shared] = False
    new_rows = torch.cumsum(~merged, 0) - 1
    new_rows[merged] = new_rows[shared[fields[merged]]]
    result.renumber(new_rows)
    return result, merged


def _unknown(task: Task, merged: Tensor) -> dict[str, int]:
    """Test values by field that have no row of their own once rows are `merged`."""
    data, counts = task.test, dict(task.test.unknown)
    singles = data.rows.shape[1]
    for f, name in enumerate(task.encoder.names):
        if f < singles:
            counts[name] += int(merged[data.rows[:, f].long()].sum())
            continue
        bag = data.bags[f - singles]
        times = torch.bincount(bag.codes, minlength=len(bag.offsets) - 1)
        times = torch.repeat_interleave(times, bag.offsets.diff())
        counts[name] += int(times[merged[bag.values.long()]].sum())
    return counts


def size_summary(encoder: Encoder, table: nn.Module) -> dict[str, Any]:
    """Kept sizes against training counts: per field, means over logarithmic bins of the count.

    Returns:
        Field name to lists `count` (mean), `size` (mean stored width), `low`, `high`, `rows`;
        and under `histogram` the number of rows per stored width.
    """
    widths, counts = methods.row_widths(table).numpy(), encoder.counts().numpy()
    result: dict[str, Any] = {"fields": {}}
    for f, name in enumerate(encoder.names):
        rows = encoder.field_rows(f).numpy()
        w, c = widths[rows], counts[rows]
        top = max(np.log2(c.max() + 1.0), 1e-9) if len(c) else 1.0
        bin_of = np.minimum((np.log2(c + 1.0) / top * _BINS).astype(int), _BINS - 1)
        entry: dict[str, list[float]] = {k: [] for k in ("count", "size", "low", "high", "rows")}
        for b in np.unique(bin_of):
            inside = bin_of == b
            entry["count"].append(float(c[inside].mean()))
            entry["size"].append(float(w[inside].mean()))
            entry["low"].append(int(w[inside].min()))
            entry["high"].append(int(w[inside].max()))
            entry["rows"].append(int(inside.sum()))
        result["fields"][name] = entry
    values, rows = np.unique(widths, return_counts=True)
    result["histogram"] = {str(int(v)): int(n) for v, n in zip(values, rows, strict=True)}
    return result


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {
        "amtl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }


def start(
    config: TrainConfig | None,
    out: Path | None = None,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    stop: Callable[[int], bool] | None = None,
    source: Source | None = None,
    time_limit: float | None = None,
    jobs: int | None = 1,
) -> Trainer:
    """A trainer ready to `run()`: fresh, warm-started, or resumed from its folder.

    Args:
        config: settings; when resuming, those in the folder count.
        out: run folder.
        resume: go on with the run in `out`.
        observer: is told how it goes.
        stop: see `Trainer`.
        source: the data if already loaded.
        time_limit: see `Trainer`.
        jobs: see `Trainer`.
    """
    more: dict[str, Any] = {"observer": observer, "stop": stop}
    more |= {"time_limit": time_limit, "jobs": jobs}
    if resume:
        if out is None:
            raise UserError("--resume needs --out DIR, the folder of the run to go on with")
        folders.require_begun(out)
        config, encoder = folders.load_inputs(out)
        earlier = _earlier(config)
        task = prepare(config, source, encoder, earlier)
        trainer = Trainer(config, task, out, **more)
        trainer.resume()
        return trainer
    if config is None:
        raise UserError("a fresh run needs settings")
    earlier = _earlier(config)
    if earlier is not None:
        source = source or load_source(config.data, config.negatives)
        config = earlier.continued(config, source)
    return Trainer(config, prepare(config, source, earlier=earlier), out, **more)


def _earlier(config: TrainConfig) -> Earlier | None:
    return folders.load_earlier(Path(config.warm_start)) if config.warm_start else None
