"""Sizes at equal bytes: `amtl train` at its defaults on several data sets, budgets and seeds.

    python -m bench.sizes run OUT.jsonl --seeds 10,11,12 --also ml=FILE:LABEL:FIELD,FIELD,...
    python -m bench.sizes table OUT.jsonl [-o SUMMARY.json]

A run is a line of OUT, written when it ends; runs that are there are not made again, so it can be
stopped at any time. One thread; start it twice, with the same OUT, to keep two cores busy. Fixed
tables, like the sized ones, train plainly, with dropout and with weight decay, and validation
chooses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from amtl.data.registry import load_source
from amtl.errors import UserError
from amtl.paper.protocol import DIM, SETS, choose_sets
from amtl.paper.records import Claim, append, read
from amtl.paper.statistics import paired
from amtl.run import methods
from amtl.run.comparison import scored, train_with_teacher
from amtl.run.config import TrainConfig
from amtl.run.contest import regularised
from amtl.run.learner import Learner, Task
from amtl.run.preparation import prepare
from amtl.run.progress import Silent
from amtl.run.race import Trials
from amtl.run.teaching import Teacher
from amtl.run.training import Trainer

from bench import dropin
from bench.files import write_aside

BUDGETS = (0.03, 0.0625, 0.125, 0.4)
NARROW = {0.0625: 1, 0.125: 2, 0.4: 6}
"""Width of the fixed table that is no larger than the budget; below 1/D there is none."""

FEW_BITS = {
    0.016: (2, "4"),
    0.03: (4, "4"),
    0.0625: (8, "4"),
    0.125: (16, "4"),
    0.4: (16, "8"),
}
"""Width and bits of the fixed table that takes about the budget, step sizes not counted."""

Key = tuple[str, str, float]


KINDS = ("fixed", "amtl", "few-bits", "taught", "rule")
LINES = ("plain", "convert", "compress")
"""Kinds of `bench.dropin`, which are not among those that are run if none are named."""

BITS_OF_LINES = {0.03: (None, 4), 0.0625: (None, 4), 0.125: (None, 4), 0.4: (None, 8)}
"""Bits that `convert` is tried with at a budget."""

TAUGHT = (0.03, 0.125)
"""Budgets at which the fixed table of few bits is also given a teacher."""


def jobs(
    sets: Sequence[str],
    seeds: Sequence[int],
    kinds: Sequence[str] = KINDS,
    budgets: Sequence[float] = BUDGETS,
    training: dropin.Training = dropin.USUAL,
) -> list[dict[str, Any]]:
    """All runs: full size and fixed tables of the same bytes, then what is sized by row.

    Args:
        sets: names of data sets.
        seeds: of the weights and the order of samples.
        kinds: some of `KINDS` and `LINES`.
        budgets: of what is sized by row, and of the narrow tables and those of few bits beside it.
        training: of the tables of `LINES`.
    """
    found = []
    for seed in seeds:
        for kind in kinds:
            for name in sets:
                base: dict[str, Any] = {"set": name, "seed": seed}
                if kind in LINES:
                    base |= training.unusual()
                if kind in ("fixed", "plain"):
                    dims = dict.fromkeys((DIM, *(NARROW[b] for b in budgets if b in NARROW)))
                    found += [{**base, "method": kind, "dim": dim} for dim in dims]
                elif kind == "few-bits":
                    found += [
                        {**base, "method": "fixed", "dim": dim, "bits": bits}
                        for dim, bits in (FEW_BITS[b] for b in budgets if b in FEW_BITS)
                    ]
                elif kind in ("convert", "compress"):
                    found += [
                        {
                            **base,
                            "method": kind,
                            "budget": b,
                            **({"bits": str(bits)} if bits else {}),
                        }
                        for b in budgets
                        for bits in BITS_OF_LINES.get(b, (None,))
                    ]
                elif kind == "taught":
                    found.append({**base, "method": "fixed", "dim": DIM, "taught": True})
                else:
                    found += [{**base, "method": kind, "budget": b} for b in budgets]
    return found


def run_all(
    out: Path,
    sets: dict[str, tuple[str, str, str]],
    seeds: Sequence[int],
    kinds: Sequence[str] = KINDS,
    budgets: Sequence[float] = BUDGETS,
    training: dropin.Training = dropin.USUAL,
) -> None:
    """Makes the runs that `out` lacks and nobody else is making."""
    torch.set_num_threads(1)
    loaded: dict[str, Any] = {}
    for job in jobs(list(sets), seeds, kinds, budgets, training):
        with Claim(out, job) as mine:
            if not mine:
                continue
            data, label, fields = sets[job["set"]]
            if job["set"] not in loaded:
                loaded.clear()
                source = load_source(data)
                columns = fields.split(",") if fields else []
                config = TrainConfig(source.name, label, fields=columns)
                loaded[job["set"]] = (source, columns, prepare(config, source))
            source, columns, task = loaded[job["set"]]
            method = "fixed" if job["method"] in LINES else job["method"]
            settings = {**source.settings(method), "dim": DIM}
            config = TrainConfig(source.name, label, fields=columns, **settings)
            for line in _runs(job, config, task):
                append(out, line)
                print(f"{line['job']}: test AUC {line['test_auc']:.4f}", file=sys.stderr)


def _runs(job: dict[str, Any], config: TrainConfig, task: Task) -> Iterator[dict[str, Any]]:
    if job["method"] in LINES:
        bits = int(job["bits"]) if "bits" in job else None
        dim = job.get("dim", DIM)
        after = job["method"] == "compress"
        training = dropin.Training.of(job)
        run = dropin.train(task, job["seed"], dim, job.get("budget"), bits, after, training)
        yield {"job": job, **run}
    elif job.get("taught"):
        yield from _taught(job, config, task)
    else:
        yield from _made(job, config, task)


def _made(job: dict[str, Any], config: TrainConfig, task: Task) -> Iterator[dict[str, Any]]:
    given = {k: v for k, v in job.items() if k != "set"}
    config = replace(config, **given)
    started = time.process_time()
    tried: list[dict[str, Any]] = []

    def train(entry: TrainConfig) -> float:
        tried.append(Trainer(entry, task).run())
        return float(tried[-1]["val_score"])

    if job["method"] == "fixed":
        regularised(config, train)
    else:
        train(config)
    metrics = max(tried, key=lambda m: float(m["val_score"]))
    keep = ("test_auc", "test_logloss", "val_auc", "val_logloss", "stored_bytes")
    keep += ("dense_bytes", "best_epoch", "epochs_run", "raced")
    line = {"job": job, "cpu": time.process_time() - started}
    yield {**line, **{k: metrics[k] for k in keep}}


def _taught(job: dict[str, Any], config: TrainConfig, task: Task) -> Iterator[dict[str, Any]]:
    """Fixed tables with a teacher: some of few bits, and last the full one, which `job` names.

    The full table is every teacher's best model; the effort is that of a sized run.
    """
    seeded = replace(config, method="fixed", seed=job["seed"])
    teacher = Teacher()

    def train(dim: int, bits: str | None) -> dict[str, Any]:
        started = time.process_time()
        entry = replace(seeded, dim=dim, bits=bits or "32")
        trials = Trials(partial(Learner, task=task), Silent(), Learner.step)
        best, pupil = train_with_teacher("", entry, teacher, trials)
        learner = pupil or best
        return {
            "job": {**job, "dim": dim, **({"bits": bits} if bits else {})},
            "cpu": time.process_time() - started,
            **scored("taught", learner),
            "dense_bytes": methods.dense_bytes(learner.table),
            "epochs_run": learner.epochs,
        }

    full = train(DIM, None)
    for budget in TAUGHT:
        yield train(*FEW_BITS[budget])
    yield full


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per set, method and budget or width: means over seeds, and paired differences of test AUC.

    Differences are against the full table, the fixed table of the same bytes and `rule` at the
    same budget, over the seeds that both have, with the half width of the 95 % t-interval.
    """
    groups: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        job = record["job"]
        size = job["budget"] if "budget" in job else job["dim"] / DIM
        method = job["method"] + (f" int{job['bits']}" if "bits" in job else "")
        method += " taught" if job.get("taught") else ""
        method += _lines_trained(job)
        groups[job["set"], method, size][job["seed"]] = record

    def aucs(runs: dict[int, dict[str, Any]]) -> dict[int, float]:
        return {seed: run["test_auc"] for seed, run in runs.items()}

    summary = []
    for (name, method, size), runs in sorted(groups.items()):
        entry: dict[str, Any] = {"set": name, "method": method, "size": size, "seeds": len(runs)}
        for key in ("test_auc", "test_logloss", "val_auc", "stored_bytes", "cpu"):
            values = [run[key] for run in runs.values()]
            entry[key] = statistics.fmean(values)
            if key == "test_auc" and len(values) > 1:
                entry["deviation"] = statistics.stdev(values)
        entry["of_full"] = entry["stored_bytes"] / statistics.fmean(
            run["dense_bytes"] * DIM / run["job"].get("dim", DIM) for run in runs.values()
        )
        trained = _lines_trained(next(iter(runs.values()))["job"])
        plain = f"plain{trained}" if method.startswith(LINES) else "fixed"
        rivals: dict[str, Key] = {"full": (name, plain, 1.0)}
        if "fixed" not in method and size in NARROW:
            rivals["narrow"] = (name, plain, NARROW[size] / DIM)
        if plain == "fixed" and "fixed" not in method:
            rivals["full_taught"] = (name, "fixed taught", 1.0)
            if size in FEW_BITS:
                dim, bits = FEW_BITS[size]
                rivals["few_bits"] = (name, f"fixed int{bits}", dim / DIM)
                rivals["few_bits_taught"] = (name, f"fixed int{bits} taught", dim / DIM)
            if method == "amtl":
                rivals["rule"] = (name, "rule", size)
        entry["against"] = {
            rival: difference
            for rival, key in rivals.items()
            if key != (name, method, size)
            and (difference := paired(aucs(runs), aucs(groups.get(key, {}))))
        }
        summary.append(entry)
    return summary


def _lines_trained(job: dict[str, Any]) -> str:
    """How the tables of `LINES` are trained, in a method's name: nothing where it is as usual."""
    numbers = (f" {name} {job[name]:g}" for name in ("rate", "decay", "batch") if name in job)
    return (" adagrad" if job.get("adagrad") else "") + "".join(numbers)


def table(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as a Markdown table a set."""
    lines: list[str] = []
    for name in dict.fromkeys(entry["set"] for entry in summary):
        lines += [f"**{name}**", ""]
        columns = ("test AUC", "log loss", "bytes", "of full", "− full", "− same bytes")
        columns += ("− same bytes, few bits", "− full, taught")
        columns += ("− few bits, taught", "− rule")
        lines += [f"| | {' | '.join(columns)} |"]
        lines += ["|---|---|---|---:|---:|---|---|---|---|---|---|"]
        for entry in summary:
            if entry["set"] != name:
                continue
            method = entry["method"]
            label = (
                f"{method}, D = {round(entry['size'] * DIM)}"
                if method.startswith(("fixed", "plain"))
                else f"{method}, ≤ {100 * entry['size']:.3g} %"
            )
            spread = f" ± {entry['deviation']:.4f}" if "deviation" in entry else ""
            lines.append(
                f"| {label} | {entry['test_auc']:.4f}{spread} ({entry['seeds']}) "
                f"| {entry['test_logloss']:.4f} | {entry['stored_bytes']:,.0f} "
                f"| {100 * entry['of_full']:.1f} % | "
                + " | ".join(
                    _gain(entry["against"].get(rival))
                    for rival in (
                        *("full", "narrow", "few_bits"),
                        *("full_taught", "few_bits_taught", "rule"),
                    )
                )
                + " |"
            )
        lines.append("")
    return "\n".join(lines)


def _gain(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    half = "" if difference["half"] is None else f" ± {difference['half']:.4f}"
    return f"{difference['mean']:+.4f}{half}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sizes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--sets", default=",".join(SETS))
    run.add_argument("--seeds", default="10,11,12,13,14")
    run.add_argument("--kinds", default=",".join(KINDS))
    run.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    dropin.Training.add_to(run, "of plain, convert and compress")
    run.add_argument("--also", action="append", default=[], metavar="NAME=DATA:LABEL:FIELDS")
    show = commands.add_parser("table")
    show.add_argument("out", type=Path)
    show.add_argument("-o", "--summary", type=Path)
    args = parser.parse_args(argv)
    if args.command == "run":
        try:
            sets = choose_sets(args.sets, args.also)
        except UserError as error:
            parser.error(str(error))
        seeds = [int(seed) for seed in args.seeds.split(",")]
        budgets = [float(budget) for budget in args.budgets.split(",")]
        run_all(args.out, sets, seeds, args.kinds.split(","), budgets, dropin.Training.given(args))
        return
    summary = summarise(list(read(args.out)))
    if args.summary:
        write_aside(args.summary, json.dumps(summary, indent=1) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
