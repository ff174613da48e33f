"""What a run is held against: a table of full size, and one of fixed width in the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from torch import Tensor

from amtl.layer.rounding import unit
from amtl.run import methods
from amtl.run.backbones import least_dim
from amtl.run.config import BITS, TrainConfig
from amtl.run.contenders import (
    SURELY,
    likely_regularised,
    race_taught,
    regularised,
    run_to_end,
    titled,
)
from amtl.run.learner import Learner
from amtl.run.metrics import FEW, auc, log_loss, rarer, score_error
from amtl.run.model import predict
from amtl.run.race import CAPACITY_BITS, FLAT, FULL, Trials, best_record, plain
from amtl.run.teaching import Teacher

THIS, TAUGHT = "this model", ", taught"
_SCORES = ("val_auc", "val_logloss", "test_auc", "test_logloss")

_NOTABLE = 0.001
"""In AUC minus log loss: by so much two seeds of one model differ."""

_DOUBLY = 2.0
"""Times `SURELY`, of which a lead has to be on few rows of a class: the best of several models is
the luckiest there, and the standard error is itself a guess."""

_TOO_GOOD = 0.999
"""A validation AUC that clicks do not have."""
_FEWEST = 10
"""Positive or negative rows: an AUC of fewer may be that good by chance."""

_CHANCE = 2.0
"""Standard errors from 0.5, below which an AUC may be chance."""


def narrow_width(metrics: Mapping[str, Any], least: int = 1) -> int:
    """Width of the widest table of fixed width that is no larger than the run's; 0 for none.

    Args:
        metrics: of the run.
        least: that its backbone needs.
    """
    per_number = metrics["dense_bytes"] / metrics["dim"]
    width = int(metrics["stored_bytes"] / per_number + 0.5)
    return width if width >= least else 0


def baselines(config: TrainConfig, metrics: Mapping[str, Any]) -> dict[str, TrainConfig]:
    """Settings of the two tables by name; the narrow one only where its rows fit the bytes."""
    found = {FULL: plain(config)}
    width = narrow_width(metrics, least_dim(config.backbone))
    if width:
        # Rows to start warm from are as wide as the full ones.
        found[FLAT] = replace(found[FULL], dim=width, warm_start=None)
    return found


def train_baselines(
    config: TrainConfig,
    metrics: Mapping[str, Any],
    says: Tensor,
    trials: Trials,
    full: Learner | None = None,
) -> list[dict[str, Any]]:
    """Trains the two tables with the run's effort, and scores the test split once each.

    Where the run's dropout or weight decay was left to validation, theirs is; where it had a
    teacher, each is trained once more with one of its own, made of what is trained here.

    Args:
        config: settings of the run.
        metrics: its metrics.
        says: logits of the validation split by its model.
        trials: by what learners are made and trained.
        full: the first of the two tables, if the run has trained and ended it.

    Returns:
        Per table, and per table that is better for its teacher: `name`, `dim`, `distillation`,
        `embedding_decay`, `stored_bytes`, scores on validation and test, `best_epoch`, and as
        `error` the standard error of the difference to the run's score.
    """
    raced = metrics["raced"] or {}
    asked = raced.get("asked", {})
    share = asked.get("embedding_dropout", config.embedding_dropout)
    decay = asked.get("embedding_decay", config.embedding_decay)
    rows, teacher = [], Teacher()

    def add(name: str, learner: Learner) -> None:
        val = learner.task.val
        error = score_error(learner.says(), says, val.labels, val.weights)
        rows.append({**scored(name, learner), "error": error})

    # A run that ran out of time had meant to try what these then have.
    with_teacher = raced.get("taught") or ("asked" in raced and metrics["cut_short"])
    # Without a race the run's dropout is not what the full table was trained with, nor are values
    # that are hidden.
    trained = {FULL: full} if "asked" in raced and not config.hides else {}
    entries = {
        name: replace(entry, embedding_dropout=share, embedding_decay=decay)
        for name, entry in baselines(config, metrics).items()
    }
    for name, entry in entries.items():
        if trained.get(name) is None:
            first = likely_regularised(entry) if with_teacher else [entry]
            trials.expect(*first, later=True)
    for name, entry in entries.items():
        title = f"{name}, D={entry.dim}"
        if with_teacher:
            best, pupil = train_with_teacher(title, entry, teacher, trials, trained.get(name))
        else:
            best, pupil = trials.make(entry), None
            run_to_end(title, best, trials)
            best.end()
        add(name, best)
        if pupil is not None:
            add(name + TAUGHT, pupil)
    return rows


def train_with_teacher(
    name: str,
    entry: TrainConfig,
    teacher: Teacher,
    trials: Trials,
    trained: Learner | None = None,
) -> tuple[Learner, Learner | None]:
    """Trains a table by itself, and then again with a teacher that it has joined.

    Args:
        name: in the progress bar.
        entry: settings; dropout and weight decay are tried where they leave them open.
        teacher: takes in the table.
        trials: by what learners are made and trained.
        trained: what the first training would give, if it is there.

    Returns:
        The better one without a teacher, and the taught one if it validates better still; ended.
    """
    best = trained

    def train(settings: TrainConfig) -> float:
        nonlocal best
        learner = trials.make(settings)
        run_to_end(titled(name, settings), learner, trials)
        score = best_record(learner)["score"]
        if best is None or score > best_record(best)["score"]:
            best = learner
        return float(score)

    if best is None:
        regularised(entry, train, trials=trials)
    assert best is not None
    teacher.add(best)
    taught, decay = trials.taught(teacher.labels()), best.config.embedding_decay
    pupil, _ = race_taught(best, taught, decay, entry)
    if pupil is not None:
        pupil.end()
    return best, pupil


def scored(name: str, learner: Learner) -> dict[str, Any]:
    """A model that has ended, as a row of `train_baselines`; scores the test split."""
    assert learner.best is not None
    record, test = learner.best["record"], learner.task.test
    learner.calm()
    logits = predict(learner.model, test)
    return {
        "name": name,
        "dim": learner.config.dim,
        "distillation": learner.config.distillation,
        "embedding_decay": learner.config.embedding_decay,
        "stored_bytes": methods.stored_bytes(learner.table),
        "val_auc": record["val_auc"],
        "val_logloss": record["val_logloss"],
        "score": record["score"],
        "test_auc": auc(logits, test.labels, test.weights),
        "test_logloss": log_loss(logits, test.labels, test.weights),
        "best_epoch": record["epoch"],
    }


def table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The comparison at the end of a run, as header and cells.

    Scores after as many epochs as the race lasted, and at the end where there is one.
    """
    early = _early(metrics)
    late = {row["name"]: row for row in metrics.get("compared") or []}
    late[THIS] = dict(metrics)
    full = (metrics["raced"] or {}).get("full")
    if full is not None:
        late.setdefault(FULL, full)
    header = ["table", "bytes"]
    epochs = max((row["epochs"] for row in early.values()), default=0)
    if early:
        header += [f"val AUC, {epochs:g} epochs", "log loss"]
    header += ["val AUC, end", "log loss", "test AUC", "log loss"]
    rows = []
    for name in (THIS, FULL, FULL + TAUGHT, FLAT, FLAT + TAUGHT):
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


def choices(metrics: Mapping[str, Any]) -> str:
    """As options of the command line: what a race has settled, or a run without one has had."""
    config = metrics["config"]
    if not metrics["raced"]:
        decay = config["embedding_decay"]
        given = f"as given, --bits {metrics['bits']}"
        return f"{given} --embedding-decay {decay:g}" if decay else given
    capacity = config["table_options"].get("capacity_bits")
    found = {
        "bits": metrics["bits"],
        "capacity-bits": None if capacity is None or capacity > max(CAPACITY_BITS) else capacity,
        "distillation": config["distillation"],
        "embedding-dropout": config["embedding_dropout"],
        "embedding-decay": config["embedding_decay"],
    }
    hides = " --hide-unseen" if config.get("hides") else ""
    return " ".join(f"--{name} {value:g}" for name, value in found.items() if value) + hides


def _as_options(row: Mapping[str, Any]) -> str:
    """What a table of `train_baselines` was trained with, for the command line."""
    found = {name: row.get(name) for name in ("distillation", "embedding_decay")}
    return "".join(f" --{name.replace('_', '-')} {v:g}" for name, v in found.items() if v)


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """What the scores say against the sizes or the budget that were asked for, the worst first."""
    told = [*_given_away(metrics), *_guessing(metrics)]
    if cut := metrics.get("cut_short"):
        told.append(
            "time ran out: the best model until then is the result; --resume goes on for a better"
        )
    if metrics["method"] == "fixed":
        return told
    raced = metrics["raced"] or {}
    compared = list(metrics.get("compared") or [])
    found = [*compared, *filter(None, [raced.get("full")])]
    # Where the time was up in the race, its yardstick is all that there is of one.
    full = _best(found if found or not cut else raced.get("table", []), FULL)
    narrow = _best(compared, FLAT)
    behind = narrow is not None and _lead(narrow, metrics) > _NOTABLE
    if full is not None and _lead(full, metrics) > _NOTABLE:
        what = "a table of full size"
        options = "a longer --time-limit" if cut else "a larger --budget"
        if behind and not cut:
            # Of as many bytes another table makes more.
            options = f"a longer training (--patience {2 * metrics['config']['patience']})"
        if full["name"] != FULL:
            what += " that has a teacher"
            options += f", or --method fixed{_as_options(full)},"
        told.append(_better(what, full, metrics, f"this data needs {options} to lose nothing"))
    if narrow is not None and behind:
        options = f"--method fixed --dim {narrow['dim']}{_as_options(narrow)}"
        what = "a table of fixed width in the same bytes"
        told.append(_better(what, narrow, metrics, f"use {options}, or another --budget"))
    fewer = [row for row in (raced.get("less"), raced.get("less_taught")) if row and row["chosen"]]
    whole = raced["budget"] * metrics["dense_bytes"] if fewer else 0.0
    if not metrics["stored_bytes"]:
        told.append(
            "the table stores nothing, so no id changes a prediction; a larger --budget has room"
        )
    elif metrics["stored_bytes"] < whole / 2:
        told.append(
            f"fewer bytes validated better than more, so the model takes "
            f"{metrics['stored_bytes']:,} of {whole:,.0f}{_spending(metrics, raced['budget'])}"
        )
    elif metrics["config"]["table_options"].get("capacity_bits", 0) > max(CAPACITY_BITS):
        told.append(
            "a fixed width validated best in these bytes, so all rows are equally wide: sizes by "
            "row bring nothing on this data at this budget"
        )
    least = least_dim(metrics["config"]["backbone"])
    if compared and not narrow_width(metrics, least):
        row = "one number of 32 bits a row takes" if least == 1 else "two of 32 bits a row take"
        told.append(
            f"no table of fixed width is as small: {row} "
            f"{least * metrics['dense_bytes'] // metrics['dim']:,} bytes"
        )
    return told


def _given_away(metrics: Mapping[str, Any]) -> Iterator[str]:
    """A word on an AUC that only a column gives that is known no earlier than the label."""
    few = rarer(**metrics["held_out"]["val"])[0]
    if metrics["val_auc"] < _TOO_GOOD or few < _FEWEST:
        return
    # Of few rows the best of a dozen models has nearly all in order, of validation alone.
    if few < FEW and not metrics["test_auc"] >= _TOO_GOOD:
        return
    most, evidence = "", (metrics["raced"] or {}).get("evidence")
    if evidence is not None:
        name, worth = max(zip(metrics["rows_by_field"], evidence, strict=True), key=itemgetter(1))
        most = f", above all {name!r} (log loss rises by {worth:.2g} without it)"
    yield (
        f"a validation AUC of {metrics['val_auc']:.4f} is rarely true: look for a column that "
        f"tells the label and is known no earlier{most}, and leave it out by --drop, or for rows "
        "that are there more than once"
    )


def _guessing(metrics: Mapping[str, Any]) -> Iterator[str]:
    """A word on a test AUC that chance would give."""
    error = metrics.get("test_auc_error")
    if not error or math.isnan(error) or metrics["test_auc"] - 0.5 > _CHANCE * error:
        return
    later = metrics["config"]["split"].startswith("order:")
    why = ": later rows may be unlike those it was trained on" if later else ""
    yield f"a test AUC within {_CHANCE:g} standard errors of 0.5 is no better than guessing{why}"


def _better(what: str, row: Mapping[str, Any], metrics: Mapping[str, Any], advice: str) -> str:
    """A word on a table that leads a run: what to do where that is more than noise."""
    lead, error = _lead(row, metrics), row.get("error")
    # Files of earlier versions say no error, and of a single positive row there is none.
    noise = "" if error is None or math.isnan(error) else f" ± {error:.4f} s.e."
    if error is not None:
        few, words = rarer(**metrics["held_out"]["val"])
        if not lead > (SURELY if few >= FEW else _DOUBLY * SURELY) * error:
            advice = f"within the noise of {words} in validation, so no reason to change anything"
    return f"{what} validates better, by {lead:.4f}{noise} in AUC minus log loss: {advice}"


def _spending(metrics: Mapping[str, Any], budget: float) -> str:
    """How to spend what fewer bytes left of a budget; empty where no option does.

    Few bits fill no more than their part of it, and `--no-race` alone has four.
    """
    config = TrainConfig.from_dict(metrics["config"])
    alone = config.number_bits or 32
    enough = [
        bits
        for bits in map(int, BITS[:0:-1])
        if bits >= 32 * budget and config.dim % unit(bits) == 0 and (config.masters or bits < 32)
    ]
    if not enough:
        return ""
    more = "" if alone in enough else f" --bits {enough[0]}"
    return f"; --no-race{more} spends nearly all"


def _best(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """Of the rows of a table, alone and with a teacher, the one that validates best."""
    named = [row for row in rows if row["name"] in (name, name + TAUGHT)]
    valid = [row for row in named if row["val_auc"] is not None]
    return max(valid, key=score_of, default=None)


def _lead(row: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """By how much a model validates better than another, in AUC minus log loss."""
    return score_of(row) - score_of(other)


def score_of(row: Mapping[str, Any]) -> float:
    """What a run's metrics, or a row in them, say that it scored on validation."""
    found = row.get("score", row.get("val_score"))
    if found is None:
        # Files of earlier versions say no score: it was this.
        found = row["val_auc"] - row["val_logloss"]
    return float(found)


def _early(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {row["name"]: row for row in (metrics["raced"] or {}).get("table", [])}
    chosen = next((row for row in rows.values() if row["chosen"]), None)
    if chosen is None:
        return {}
    return {THIS: chosen, **{name: rows[name] for name in (FULL, FLAT) if name in rows}}


def _number(row: Mapping[str, Any] | None, key: str) -> str:
    value = None if row is None else row.get(key)
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
