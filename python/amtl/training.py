"""The training job: from settings to a trained model, its metrics and its files.

A run folder holds `config.json`, `vocabulary.safetensors` (fields and vocabularies as fitted),
`checkpoint.safetensors` (everything needed to go on), `best.safetensors` (the model with the best
validation AUC) and, at the end, `metrics.json`.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from amtl import methods
from amtl.config import TrainConfig
from amtl.data.encoding import EncodedData, Encoder, infer_fields
from amtl.data.registry import Source, load_source, read_labels
from amtl.data.splits import split_rows
from amtl.errors import UserError
from amtl.metrics import auc, log_loss
from amtl.model import build_model, predict
from amtl.progress import Observer, Silent
from amtl.store import runs

_TIMED_STEPS = 20_000
"""Steps per phase whose times are kept, so that checkpoints of long runs stay small."""


class Interrupted(Exception):
    """Training stopped on request; the run folder holds a checkpoint to resume from."""


@dataclass
class Task:
    """Encoded data of a run.

    Attributes:
        encoder: fitted on the training split.
        train, val, test: the three splits.
    """

    encoder: Encoder
    train: EncodedData
    val: EncodedData
    test: EncodedData


def prepare(
    config: TrainConfig, source: Source | None = None, encoder: Encoder | None = None
) -> Task:
    """Loads, splits and encodes the data of a run.

    Args:
        config: which data and how.
        source: the data if already loaded.
        encoder: reuse this one instead of fitting one on the training split.
    """
    source = source or load_source(config.data)
    frame = source.frame
    labels = read_labels(frame, config.label, config.label_threshold)
    parts = split_rows(frame, config.split, config.split_seed)
    if encoder is None:
        names = config.fields or default_fields(frame, config, source)
        specs = infer_fields(
            frame,
            names,
            numeric={**{k: v for k, v in source.numeric.items() if k in names}, **config.numeric},
            default_numeric=config.default_numeric,
            separators=config.separators,
        )
        encoder = Encoder.fit(frame[parts[0].numpy()], specs, config.min_count)
    train, val, test = (encoder.transform(frame[p.numpy()], labels[p]) for p in parts)
    return Task(encoder, train, val, test)


def default_fields(frame: pl.DataFrame, config: TrainConfig, source: Source) -> list[str]:
    """The fields used if none are named: the set's own, or all but label and split column."""
    if source.fields:
        return list(source.fields)
    skip = {config.label, config.split.removeprefix("order:")}
    return [name for name in frame.columns if name not in skip]


class Trainer:
    """Trains one model; can stop at any step and go on as if it had not.

    Args:
        config: settings.
        task: encoded data, as fitted (not renumbered).
        out: run folder, or None to keep nothing on disk.
        observer: is told how it goes.
        stop: asked after every step with the number of steps done; True stops the run with a
            checkpoint.
        checkpoint_seconds: also save in mid-epoch when the last checkpoint is this old.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        out: Path | None = None,
        observer: Observer | None = None,
        stop: Callable[[int], bool] | None = None,
        checkpoint_seconds: float = 300.0,
    ) -> None:
        self.config = config
        self.task = task
        self.out = out
        self.observer: Observer = observer or Silent()
        self.stop = stop or (lambda steps: False)
        self.checkpoint_seconds = checkpoint_seconds
        self.model = build_model(config, task.encoder)
        self.table = self.model.table
        self.table_optimizer = methods.table_optimizer(
            config.table_optimizer, methods.table_parameters(self.table), config.table_lr
        )
        self.dense_optimizer = torch.optim.Adam(self.model.mlp.parameters(), config.lr, fused=True)
        masks = methods.mask_parameters(self.table)
        self.mask_optimizer = torch.optim.Adam(masks, config.mask_lr) if masks else None
        self.steps_per_epoch = math.ceil(len(task.train) / config.batch_size)
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.step_seconds: dict[str, list[float]] = {"search": [], "frozen": []}
        self.losses: list[float] = []
        self.best: dict[str, Any] = {"epoch": -1, "val_auc": -1.0}
        self.best_model: dict[str, Tensor] | None = None
        self.row_map: Tensor | None = None
        self.finished = False
        self._epoch_seconds = 0.0
        self._saved_at = time.monotonic()
        self._fresh = True

    @property
    def frozen(self) -> bool:
        """Whether sizes are fixed."""
        return methods.is_frozen(self.table)

    @property
    def steps_done(self) -> int:
        """Steps taken since the start of training."""
        return self.epoch * self.steps_per_epoch + self.step

    def warm_start(self, run: Path) -> int:
        """Copies matching rows of a trained `fixed` run into the table; returns how many.

        Values are matched by field name and raw value; the out-of-vocabulary row by being that.
        """
        donor = runs.load_run(run)
        if donor.config.method != "fixed":
            raise UserError(f"--warm-start {run}: a run of --method fixed is needed")
        if donor.config.dim != self.config.dim:
            raise UserError(
                f"--warm-start {run}: its width is {donor.config.dim}; use --dim {donor.config.dim}"
            )
        source = methods.table_parameters(donor.model.table)[0].detach()
        target = methods.table_parameters(self.table)[0]
        matched = 0
        for f, name in enumerate(self.task.encoder.names):
            if name not in donor.encoder.names:
                continue
            g = donor.encoder.names.index(name)
            theirs, ours = donor.encoder.vocabularies[g], self.task.encoder.vocabularies[f]
            known = torch.ones(ours.size, dtype=torch.bool)
            known[ours.oov_row] = False
            local = torch.nonzero(known).view(-1)
            rows, _ = theirs.encode_counted(pl.Series(ours.values, dtype=ours.dtype))
            hit = rows != theirs.oov_row
            local = torch.cat([local[hit], torch.tensor([ours.oov_row])])
            rows = torch.cat([rows[hit].long(), torch.tensor([theirs.oov_row])])
            with torch.no_grad():
                target[self.task.encoder.field_rows(f)[local]] = source[
                    donor.encoder.field_rows(g)[rows]
                ].to(target.dtype)
            matched += len(local)
        if not matched:
            raise UserError(f"--warm-start {run}: it has no field in common with this run")
        return matched

    def run(self) -> dict[str, Any]:
        """Trains until early stopping or the last epoch, restores the best model, tests it once.

        Returns:
            The metrics, also written to `metrics.json`.

        Raises:
            Interrupted: if `stop` asked for it.
        """
        config = self.config
        title = f"{config.method} D={config.dim}"
        if config.effective_budget is not None:
            title += f" {config.effective_budget:.1%}"
        if self.out and self._fresh:
            runs.begin_run(self.out, config, self.task.encoder)
            self._fresh = False
        self.observer.begin(title, self.steps_per_epoch, config.epochs, self.steps_done)
        try:
            while not self.finished:
                self._train_epoch()
        finally:
            self.observer.end()
        return self._finish()

    def _train_epoch(self) -> None:
        if not self.frozen and self.epoch >= self._freeze_epoch():
            self._freeze()
        order = torch.randperm(
            len(self.task.train),
            generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch),
        )
        phase = "search" if not self.frozen else "frozen"
        total = self.steps_per_epoch * self.config.epochs
        self.model.train()
        size = self.config.batch_size
        start_of_call = time.perf_counter()
        while self.step < self.steps_per_epoch:
            started = time.perf_counter()
            samples = order[self.step * size : (self.step + 1) * size]
            if phase == "search":
                self.table.update_schedule(self.steps_done / total)  # type: ignore[operator]
            loss = self._train_step(samples)
            if len(self.step_seconds[phase]) < _TIMED_STEPS:
                self.step_seconds[phase].append(time.perf_counter() - started)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} in epoch {self.epoch + 1}; lower --table-lr or --lr"
                )
            self.losses.append(loss)
            self.step += 1
            self.observer.step(self.epoch, loss, len(samples))
            if self.stop(self.steps_done):
                self._epoch_seconds += time.perf_counter() - start_of_call
                self.save()
                raise Interrupted
            if self.out and time.monotonic() - self._saved_at > self.checkpoint_seconds:
                self.save()
        self._epoch_seconds += time.perf_counter() - start_of_call
        self._end_epoch(phase)

    def _train_step(self, samples: Tensor) -> float:
        batch = self.task.train.batch(samples)
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(batch), batch.labels)
        loss.backward()
        for optimizer in (self.dense_optimizer, self.table_optimizer, self.mask_optimizer):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        return float(loss.detach())

    def _end_epoch(self, phase: str) -> None:
        logits = predict(self.model, self.task.val)
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "phase": phase if self.config.method != "fixed" else "",
            "loss": statistics.fmean(self.losses),
            "val_auc": auc(logits, self.task.val.labels),
            "val_logloss": log_loss(logits, self.task.val.labels),
            "stored_bytes": methods.stored_bytes(self.table),
            "seconds": self._epoch_seconds,
        }
        if self.frozen and record["val_auc"] > self.best["val_auc"]:
            self.best = {"epoch": self.epoch, "val_auc": record["val_auc"]}
            state: dict[str, Any] = {
                "model": self.model.state_dict(),
                "row_map": self.row_map,
                "epoch": self.epoch,
            }
            if self.out:
                runs.save_checkpoint(self.out, "best", state)
            else:
                self.best_model = {k: v.detach().clone() for k, v in state["model"].items()}
        record["best_val_auc"] = self.best["val_auc"]
        self.history.append(record)
        self.epoch += 1
        self.step = 0
        self.losses = []
        self._epoch_seconds = 0.0
        stale = self.best["epoch"] >= 0 and self.epoch - 1 - self.best["epoch"] >= (
            self.config.patience
        )
        self.finished = self.epoch >= self.config.epochs or (self.frozen and stale)
        self.observer.epoch(record)
        self.save()

    def _freeze_epoch(self) -> int:
        share = float(self.table.freeze_at)  # type: ignore[arg-type]
        return min(max(round(share * self.config.epochs), 1), self.config.epochs - 1)

    def _freeze(self) -> None:
        """Fixes sizes, moves table and optimizer state to tiers, renumbers the data once."""
        self.table.freeze(self.table_optimizer)  # type: ignore[operator]
        new_rows = self.table.absorb_order()  # type: ignore[operator]
        self.mask_optimizer = None
        self._renumber(new_rows)
        stored, full = methods.stored_bytes(self.table), methods.dense_bytes(self.table)
        self.observer.note(
            f"sizes frozen: {stored:,} of {full:,} bytes ({stored / full:.1%}), "
            f"{len(methods.table_parameters(self.table))} size tiers"
        )

    def _renumber(self, new_rows: Tensor) -> None:
        self.row_map = new_rows.to(torch.int32)
        self.task.encoder.renumber(new_rows)
        for part in (self.task.train, self.task.val, self.task.test):
            part.renumber(new_rows)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""
        return {
            "model": self.model.state_dict(),
            "table_optimizer": self.table_optimizer.state_dict(),
            "dense_optimizer": self.dense_optimizer.state_dict(),
            "mask_optimizer": self.mask_optimizer.state_dict() if self.mask_optimizer else None,
            "row_map": self.row_map,
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "step_seconds": self.step_seconds,
            "epoch_seconds": self._epoch_seconds,
            "best": self.best,
            "finished": self.finished,
            "rng": torch.get_rng_state(),
        }

    def save(self) -> None:
        """Writes the checkpoint, if there is a run folder."""
        if self.out:
            runs.save_checkpoint(self.out, "checkpoint", self.state())
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Goes back to the state in the run folder."""
        assert self.out is not None
        state = runs.load_checkpoint(self.out, "checkpoint")
        self.model.load_state_dict(state["model"])
        if state["row_map"] is not None:
            self.table_optimizer = methods.table_optimizer(
                self.config.table_optimizer,
                methods.table_parameters(self.table),
                self.config.table_lr,
            )
            self.mask_optimizer = None
            self._renumber(state["row_map"])
        self.table_optimizer.load_state_dict(state["table_optimizer"])
        self.dense_optimizer.load_state_dict(state["dense_optimizer"])
        if self.mask_optimizer and state["mask_optimizer"]:
            self.mask_optimizer.load_state_dict(state["mask_optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.losses = state["history"], state["losses"]
        self.step_seconds = state["step_seconds"]
        self._epoch_seconds = state["epoch_seconds"]
        self.best, self.finished = state["best"], state["finished"]
        torch.set_rng_state(state["rng"])
        self._fresh = False

    def _finish(self) -> dict[str, Any]:
        if self.best["epoch"] < 0:
            raise UserError("no epoch gave a valid AUC; does validation hold both classes?")
        if self.out:
            best = runs.load_checkpoint(self.out, "best")["model"]
        else:
            assert self.best_model is not None
            best = self.best_model
        self.model.load_state_dict(best)
        logits = predict(self.model, self.task.test)
        result = collect_metrics(self, logits)
        if self.out:
            runs.save_metrics(self.out, result)
        return result


def collect_metrics(trainer: Trainer, test_logits: Tensor) -> dict[str, Any]:
    """The record of a finished run."""
    config, encoder, table = trainer.config, trainer.task.encoder, trainer.table
    labels = trainer.task.test.labels
    widths = methods.row_widths(table)
    itemsize = methods.table_parameters(table)[0].element_size()
    fields = encoder.row_fields()
    by_field = torch.bincount(fields, weights=widths.double(), minlength=len(encoder.names))
    steps = {k: statistics.median(v) * 1e3 if v else None for k, v in trainer.step_seconds.items()}
    stored, full = methods.stored_bytes(table), methods.dense_bytes(table)
    return {
        "method": config.method,
        "dim": config.dim,
        "budget": config.effective_budget,
        "seed": config.seed,
        "test_auc": auc(test_logits, labels),
        "test_logloss": log_loss(test_logits, labels),
        "val_auc": trainer.best["val_auc"],
        "best_epoch": trainer.best["epoch"] + 1,
        "epochs_run": trainer.epoch,
        "stored_bytes": stored,
        "dense_bytes": full,
        "stored_fraction": stored / full,
        "rows": encoder.num_rows,
        "mlp_bytes": sum(p.numel() * p.element_size() for p in trainer.model.mlp.parameters()),
        "bytes_by_field": {
            name: int(b) * itemsize for name, b in zip(encoder.names, by_field, strict=True)
        },
        "rows_by_field": dict(zip(encoder.names, encoder.field_sizes, strict=True)),
        "unknown_test_values": trainer.task.test.unknown,
        "step_ms_median": steps,
        "seconds": sum(r["seconds"] for r in trainer.history),
        "sizes": size_summary(encoder, table),
        "history": trainer.history,
        "config": config.to_dict(),
        "versions": versions(),
    }


def size_summary(encoder: Encoder, table: nn.Module, bins: int = 40) -> dict[str, Any]:
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
        bin_of = np.minimum((np.log2(c + 1.0) / top * bins).astype(int), bins - 1)
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
    from amtl_kernels import __version__

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
) -> Trainer:
    """A trainer ready to `run()`: fresh, warm-started, or resumed from its folder.

    Args:
        config: settings; when resuming, those in the folder count.
        out: run folder.
        resume: go on with the run in `out`.
        observer: is told how it goes.
        stop: see `Trainer`.
        source: the data if already loaded.
    """
    if resume:
        if out is None:
            raise UserError("--resume needs --out DIR, the folder of the run to go on with")
        config, encoder = runs.load_inputs(out)
        trainer = Trainer(config, prepare(config, source, encoder), out, observer, stop)
        trainer.resume()
        return trainer
    if config is None:
        raise UserError("a fresh run needs settings")
    trainer = Trainer(config, prepare(config, source), out, observer, stop)
    if config.warm_start:
        matched = trainer.warm_start(Path(config.warm_start))
        trainer.observer.note(f"warm start: {matched:,} rows from {config.warm_start}")
    return trainer
