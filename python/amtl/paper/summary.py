"""From runs to one small record: a summary a configuration, and what is to be said of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amtl.paper.protocol import DIM, RULER, Plan, contenders
from amtl.paper.statistics import half_width, holm, paired
from amtl.paper.work import Cell, Records, cell_of, choice_of, further, seeded, tried
from amtl.peers import PEERS

OURS = "amtl"
_MEANS = ("test_auc", "test_logloss", "val_auc", "bytes", "cpu", "epochs", "bias", "ece", "planted")
VERSION = 1


def summarise(records: Records, plan: Plan, versions: Mapping[str, str]) -> dict[str, Any]:
    """One record of everything, for JSON.

    Returns:
        `plan`, `methods`, `versions`; `cells`, a list of the configurations that have runs (see
        `_cell`), the table of full size among them; `at_most`, for each set, budget and contender
        the configuration of no more than that budget that validates best, with its difference to
        ours.
    """
    planned = [*plan.cells(), *further(records, plan)]
    begun = {cell_of(record) for record in records}
    cells = {cell: _cell(records, cell) for cell in planned if cell in begun}
    at_most = []
    for name in dict.fromkeys(cell[0] for cell in planned):
        for budget in sorted(plan.budgets):
            at_most += _at_most(cells, name, budget, plan)
    for entries in (list(cells.values()), at_most):
        corrected = holm([(entry["against"] or {}).get("p") for entry in entries])
        for entry, p in zip(entries, corrected, strict=True):
            if entry["against"]:
                entry["against"]["p_holm"] = p
    known = contenders()
    return {
        "version": VERSION,
        "plan": {
            "sets": {name: list(what) for name, what in plan.sets.items()},
            "budgets": list(plan.budgets),
            "methods": list(plan.methods),
            "trials": plan.trials,
            "seeds": plan.seeds,
            "finalist_seeds": plan.finalist_seeds,
            "epochs": plan.epochs,
            "backbones": list(plan.backbones),
            "dim": DIM,
            "cells": len(planned),
        },
        "methods": {
            name: {
                "about": known[name].about,
                "space": {k: list(v) for k, v in known[name].space.items()},
                "tunes_itself": known[name].tunes_itself,
                **_added(name, records),
            }
            for name in dict.fromkeys([RULER, *plan.methods])
        },
        "versions": dict(versions),
        "cells": list(cells.values()),
        "at_most": at_most,
    }


def _added(name: str, records: Records) -> dict[str, Any]:
    """Of a method that was added: its file, and the numbers that its account leaves out."""
    kind = PEERS.get(name)
    if kind is None or kind.file is None:
        return {}
    out = (r.get("unclaimed", 0) for r in records if r["job"]["method"] == name)
    return {"file": Path(kind.file).name, "unclaimed": max(out, default=0)}


def _cell(records: Records, cell: Cell) -> dict[str, Any]:
    """A configuration: its trials, its choice, its seeds, means over them, and the gain of ours."""
    name, budget, method = cell
    trials, choice = tried(records, cell), choice_of(records, cell)
    fresh = seeded(records, cell)
    runs = {s: r for s, r in fresh.items() if "refused" not in r}
    # What tunes itself has no runs of tuning; its fresh ones have no other choice.
    of_choice = [r for r in trials if "refused" not in r and r["choice"] == choice] or [
        *runs.values()
    ]
    entry: dict[str, Any] = {
        "set": name,
        "budget": budget,
        "method": method,
        "trials": len([r for r in trials if "refused" not in r]),
        "refused": next((r["refused"] for r in (*trials, *fresh.values()) if "refused" in r), None),
        "tuning_cpu": round(sum(r.get("cpu", 0.0) for r in trials), 1),
        "choice": choice if of_choice else None,
        "tuned_score": statistics.fmean(r["score"] for r in of_choice) if of_choice else None,
        "seeds": sorted(runs),
        "seed_auc": [round(runs[s]["test_auc"], 6) for s in sorted(runs)],
        "options": runs[min(runs)]["options"] if runs else None,
        "dense_bytes": of_choice[0]["dense_bytes"] if of_choice else None,
        "against": None,
    }
    for key in _MEANS:
        values = [r[key] for r in runs.values() if r.get(key) is not None]
        entry[key] = round(statistics.fmean(values), 6) if values else None
    entry["half"] = half_width([r["test_auc"] for r in runs.values()])
    first = runs[min(runs)] if runs else {}
    for key in ("loss_by_decile", "sizes"):
        entry[key] = first.get(key)
    if method != OURS and runs:
        entry["against"] = _gain(records, (name, budget, OURS), cell)
    return entry


def _gain(records: Records, ours: Cell, theirs: Cell) -> dict[str, Any] | None:
    """Ours minus theirs in test AUC, by seed."""
    return paired(*(_by_seed(records, cell) for cell in (ours, theirs)))


def _by_seed(records: Records, cell: Cell) -> dict[int, float]:
    return {s: r["test_auc"] for s, r in seeded(records, cell).items() if "refused" not in r}


def _at_most(
    cells: Mapping[Cell, dict[str, Any]], name: str, budget: float, plan: Plan
) -> list[dict[str, Any]]:
    """The best of each contender within a budget, chosen by validation."""
    found: dict[str, dict[str, Any]] = {}
    for method in plan.methods:
        fitting = [
            entry
            for (s, b, m), entry in cells.items()
            if (s, m) == (name, method) and b <= budget and entry["seeds"]
        ]
        if fitting:
            found[method] = max(fitting, key=lambda e: e["tuned_score"])
    ours = found.get(OURS)
    result = []
    for method, entry in found.items():
        against = None
        if ours is not None and method != OURS:
            against = paired(seed_aucs(ours), seed_aucs(entry))
        result.append(
            {
                "set": name,
                "budget": budget,
                "method": method,
                "from": entry["budget"],
                "test_auc": entry["test_auc"],
                "half": entry["half"],
                "bytes": entry["bytes"],
                "seeds": len(entry["seeds"]),
                "against": against,
            }
        )
    return result


def seed_aucs(entry: Mapping[str, Any]) -> dict[int, float]:
    """Test AUC of a configuration by seed."""
    return dict(zip(entry["seeds"], entry["seed_auc"], strict=True))


def ranks(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean rank of each contender by test AUC over the sets and budgets that all of them reach."""
    groups: dict[tuple[str, float], dict[str, float]] = {}
    for entry in entries:
        if entry["test_auc"] is not None:
            groups.setdefault((entry["set"], entry["budget"]), {})[entry["method"]] = entry[
                "test_auc"
            ]
    everyone = {method for group in groups.values() for method in group}
    places: dict[str, list[int]] = {}
    for group in groups.values():
        if set(group) == everyone:
            for place, method in enumerate(sorted(group, key=lambda m: -group[m]), 1):
                places.setdefault(method, []).append(place)
    return {m: statistics.fmean(p) for m, p in sorted(places.items(), key=lambda kv: sum(kv[1]))}
