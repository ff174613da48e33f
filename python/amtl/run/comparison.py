"""What a run is held against: a table of full size, and one of fixed width in the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.metrics import auc, log_loss
from amtl.run.model import predict
from amtl.run.race import DROPOUT, FLAT, FULL

THIS = "this model"
_SCORES = ("val_auc", "val_logloss", "test_auc", "test_logloss")


def narrow_width(metrics: Mapping[str, Any]) -> int:
    """Width of the widest table of fixed width that is no larger than the run's; 0 for none."""
    per_number = metrics["dense_bytes"] / metrics["dim"]
    return int(metrics["stored_bytes"] / per_number + 0.5)


def baselines(config: TrainConfig, metrics: Mapping[str, Any]) -> dict[str, TrainConfig]:
    """Settings of the two tables by name; the narrow one only where a width of 1 fits the bytes."""
    plain: dict[str, Any] = {"bits": "32", "table_options": {}, "race": False, "freeze_at": None}
    found = {FULL: replace(config, method="fixed", **plain)}
    width = narrow_width(metrics)
    if width:
        found[FLAT] = replace(config, method="fixed", dim=width, **plain)
    return found


def train_baselines(
    config: TrainConfig,
    metrics: Mapping[str, Any],
    make: Callable[[TrainConfig], Learner],
    run: Callable[[str, Learner], None],
) -> list[dict[str, Any]]:
    """Trains the two tables as the run was trained, and scores the test split once each.

    Where dropout was tried for the run it is for them: the one that validates better counts.

    Args:
        config: settings of the run.
        metrics: its metrics.
        make: a fresh learner of given settings.
        run: trains a learner of a given name to its end.

    Returns:
        Per table: `name`, `dim`, `stored_bytes`, scores on validation and test, `best_epoch`.
    """
    raced = (metrics["raced"] or {}).get("dropout") is not None
    shares = (None, DROPOUT) if raced else (config.embedding_dropout,)
    rows = []
    for name, entry in baselines(config, metrics).items():
        learner = None
        for share in shares:
            other = make(replace(entry, embedding_dropout=share))
            run(name, other)
            if learner is None or _score(other) > _score(learner):
                learner = other
        assert learner is not None
        learner.end()
        assert learner.best is not None
        record, test = learner.best["record"], learner.task.test
        logits = predict(learner.model, test)
        rows.append(
            {
                "name": name,
                "dim": entry.dim,
                "stored_bytes": methods.stored_bytes(learner.table),
                "val_auc": record["val_auc"],
                "val_logloss": record["val_logloss"],
                "test_auc": auc(logits, test.labels),
                "test_logloss": log_loss(logits, test.labels),
                "best_epoch": record["epoch"],
            }
        )
    return rows


def _score(learner: Learner) -> float:
    return -math.inf if learner.best is None else float(learner.best["record"]["score"])


def table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The comparison at the end of a run, as header and cells.

    Scores after as many epochs as the race lasted, and at the end where there is one.
    """
    early = _early(metrics)
    late = {row["name"]: row for row in metrics.get("compared") or []}
    late[THIS] = dict(metrics)
    cut = (metrics["raced"] or {}).get("cut")
    if cut is not None:
        late.setdefault(FULL, cut["full"])
    header = ["table", "bytes"]
    epochs = max((row["epochs"] for row in early.values()), default=0)
    if early:
        header += [f"val AUC, {epochs:g} epochs", "log loss"]
    header += ["val AUC, end", "log loss", "test AUC", "log loss"]
    rows = []
    for name in (THIS, FULL, FLAT):
        first, last = early.get(name), late.get(name)
        if first is None and last is None:
            continue
        stored = (last or first or {})["stored_bytes"]
        row = [name, "–" if stored is None else f"{stored:,}"]
        if early:
            row += [_number(first, key) for key in _SCORES[:2]]
            if first is not None and first["epochs"] < epochs:
                row[2] += f" ({first['epochs']:g})"
        rows.append(row + [_number(last, key) for key in _SCORES])
    return header, rows


def verdict(metrics: Mapping[str, Any]) -> str | None:
    """What the scores say against the sizes or the budget that were asked for, or None."""
    less = (metrics["raced"] or {}).get("less")
    cut = (metrics["raced"] or {}).get("cut")
    if cut is not None and cut["chosen"]:
        return None
    if less is not None and less["chosen"]:
        return (
            f"fewer bytes validated better than the whole budget, so the model takes "
            f"{metrics['stored_bytes']:,}; --no-race spends all"
        )
    narrow = next((r for r in metrics.get("compared") or [] if r["name"] == FLAT), None)
    raced = (metrics["raced"] or {}).get("table", [])
    if any(row["name"] == FLAT and row["chosen"] for row in raced):
        return (
            "a fixed width validated best in these bytes, so all rows are equally wide: sizes by "
            "row bring nothing on this data at this budget"
        )
    if narrow is None or metrics["method"] == "fixed":
        return None
    lead = (narrow["val_auc"] - narrow["val_logloss"]) - (
        metrics["val_auc"] - metrics["val_logloss"]
    )
    if lead <= 0:
        return None
    return (
        f"a table of fixed width in the same bytes validates better, by {lead:.4f} in AUC minus "
        f"log loss: use --method fixed --dim {narrow['dim']}, or another --budget"
    )


def _early(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {row["name"]: row for row in (metrics["raced"] or {}).get("table", [])}
    chosen = next((row for row in rows.values() if row["chosen"]), None)
    if chosen is None:
        return {}
    return {THIS: chosen, **{name: rows[name] for name in (FULL, FLAT) if name in rows}}


def _number(row: Mapping[str, Any] | None, key: str) -> str:
    value = None if row is None else row.get(key)
    return "–" if value is None else f"{value:.4f}"
