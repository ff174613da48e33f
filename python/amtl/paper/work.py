"""Making the runs: tuning on validation, then fresh seeds, by as many processes as are asked for.

A run of tuning is handed a task without its test split, so no choice can depend on that. The test
split is scored once by each seed of a configuration, when its choice is made.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from amtl.data.encoding import Encoder
from amtl.data.registry import Source, load_source
from amtl.data.synthetic import planted_widths
from amtl.errors import UserError
from amtl.paper.protocol import DIM, RULER, Contender, Plan, Size, contenders, variant
from amtl.paper.records import Claim, append, read
from amtl.paper.tuning import next_choice
from amtl.peers import PEERS, DoesNotFit, Peer, add_peer, code_of
from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.contenders import regularised, run_to_end
from amtl.run.learner import Learner, Task
from amtl.run.metrics import auc
from amtl.run.model import predict
from amtl.run.preparation import prepare
from amtl.run.progress import Silent
from amtl.run.race import Trials, best_record, is_open
from amtl.run.searching import is_search, search
from amtl.run.teaching import Teacher
from amtl.run.training import Trainer

TUNING_SEED = 0
FIRST_SEED = 10
FINALISTS = 3
_ALWAYS = ("amtl", "fixed")
_BINS = 10

Cell = tuple[str, float, str]
Records = Sequence[dict[str, Any]]


def cell_of(record: dict[str, Any]) -> Cell:
    """Set, budget and contender of a run."""
    job = record["job"]
    return job["set"], job["budget"], job["method"]


def of_now(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the runs of methods whose file was another one."""
    return [r for r in records if r["job"].get("code") == code_of(r["job"]["method"])]


def tried(records: Records, cell: Cell) -> list[dict[str, Any]]:
    """The runs of tuning of a cell, in their order."""
    found = [r for r in records if "trial" in r["job"] and cell_of(r) == cell]
    return sorted(found, key=lambda r: r["job"]["trial"])


def chosen(records: Records, cell: Cell) -> dict[str, Any] | None:
    """The run of tuning that validates best, None where nothing fits or nothing was tried."""
    fitting = [r for r in tried(records, cell) if "refused" not in r]
    return max(fitting, key=lambda r: r["score"]) if fitting else None


def choice_of(records: Records, cell: Cell) -> dict[str, Any] | None:
    """The choice that validates best, empty for what tunes itself, None where nothing is chosen."""
    if contenders()[cell[2]].tunes_itself:
        return {}
    best = chosen(records, cell)
    return best["choice"] if best else None


def seeded(records: Records, cell: Cell) -> dict[int, dict[str, Any]]:
    """The fresh runs of a cell, of the choice that validates best, by seed."""
    choice = choice_of(records, cell)
    return {
        r["job"]["seed"]: r
        for r in records
        if "seed" in r["job"] and cell_of(r) == cell and r["choice"] == choice
    }


def is_tuned(records: Records, cell: Cell, contender: Contender, plan: Plan) -> bool:
    """Whether nothing is left to try."""
    if contender.tunes_itself:
        return True
    runs, wanted = tried(records, cell), plan.trials
    fitting = sum("refused" not in r for r in runs)
    if fitting >= wanted or len(runs) >= wanted + math.ceil(wanted / 2) + 1:
        return True
    return _next_choice(contender, cell, runs) is None


def _next_choice(contender: Contender, cell: Cell, runs: Records) -> dict[str, Any] | None:
    past = [(contender.completed(r["choice"]), r.get("score")) for r in runs]
    return next_choice(contender.space, past, repr(cell), contender.first)


def finalists(records: Records, plan: Plan, name: str, budget: float) -> set[str]:
    """Contenders that get more seeds: those that validate best, once all have their seeds."""
    scores: dict[str, float] = {}
    for set_name, share, method in plan.cells():
        if (set_name, share) != (name, budget):
            continue
        cell = (name, budget, method)
        if choice_of(records, cell) is None:
            if not tried(records, cell):
                return set()
            continue
        runs = seeded(records, cell)
        if len(runs) < plan.seeds:
            return set()
        if not all("refused" in r for r in runs.values()):
            scores[method] = statistics.fmean(r.get("score", -math.inf) for r in runs.values())
    best = sorted(scores, key=lambda m: -scores[m])[:FINALISTS]
    return {*best, *(m for m in _ALWAYS if m in scores)}


def further(records: Records, plan: Plan) -> list[Cell]:
    """The configurations of other backbones: those of the finalists with the MLP, once known.

    A table of full size is among them, as the ruler.
    """
    if not plan.backbones:
        return []
    groups = [(name, budget) for budget in plan.budgets for name in plan.sets]
    best = {group: finalists(records, plan, *group) for group in groups}
    found: list[Cell] = []
    for backbone in plan.backbones:
        for (name, budget), those in best.items():
            if those:
                found.append((f"{name}+{backbone}", 1.0, RULER))
            found += [(f"{name}+{backbone}", budget, m) for m in plan.methods if m in those]
    return list(dict.fromkeys(found))


def jobs(records: Records, plan: Plan) -> Iterator[dict[str, Any]]:
    """What is left to do, in order: tuning and the first seed of each cell, then further seeds.

    The jobs of later rounds come when those before are done, other backbones last.
    """
    for extra in range(plan.finalist_seeds):
        for cell in plan.cells():
            if extra < plan.seeds or cell[2] in finalists(records, plan, *cell[:2]):
                yield from _left(records, plan, cell, extra)
    others = further(records, plan)
    for extra in range(plan.seeds):
        for cell in others:
            yield from _left(records, plan, cell, extra)


def _left(records: Records, plan: Plan, cell: Cell, extra: int) -> Iterator[dict[str, Any]]:
    """The next job of a cell, if there is one up to its seed number `extra`."""
    job = dict(zip(("set", "budget", "method"), cell, strict=True))
    code = code_of(cell[2])
    if code is not None:
        job["code"] = code
    if not is_tuned(records, cell, contenders()[cell[2]], plan):
        made = {r["job"]["trial"] for r in tried(records, cell)}
        yield {**job, "trial": min(set(range(len(made) + 1)) - made)}
        return
    choice, seed = choice_of(records, cell), FIRST_SEED + extra
    if choice is not None and seed not in seeded(records, cell):
        yield {**job, "seed": seed, "choice": choice}


def count(plan: Plan) -> int:
    """Runs of a plan at most."""
    known = contenders()
    cells = plan.cells()
    tuning = sum(0 if known[m].tunes_itself else plan.trials for _, _, m in cells)
    groups = {(s, b) for s, b, _ in cells}
    best = (FINALISTS + len(_ALWAYS)) * len(groups)
    # The ruler of a set with another backbone, where no budget of the plan is all of it.
    others = len(plan.backbones) * (best + len(plan.sets)) * (plan.trials + plan.seeds)
    more = best * (plan.finalist_seeds - plan.seeds)
    return tuning + plan.seeds * len(cells) + more + others


def run_plan(
    plan: Plan,
    out: Path,
    added: Sequence[Path] = (),
    workers: int = 1,
    tell: Callable[[Records], None] | None = None,
) -> None:
    """Makes the runs that `out` lacks.

    Args:
        plan: which.
        out: file of runs, a line each.
        added: files of methods to add, see `amtl.peers.add_peer`.
        workers: processes; one thread each.
        tell: called with all runs, from time to time.

    Raises:
        UserError: data, or a setting, is not to be had; or a worker died.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    running = [
        context.Process(target=_work, args=(plan, out, list(added), errors), daemon=True)
        for _ in range(workers)
    ]
    for process in running:
        process.start()
    try:
        while any(process.is_alive() for process in running):
            time.sleep(0.5)
            if tell is not None:
                tell(of_now(read(out)))
            if not errors.empty():
                raise UserError(errors.get())
    finally:
        for process in running:
            process.terminate()
            process.join()
    if not errors.empty():
        raise UserError(errors.get())
    if any(process.exitcode for process in running):
        raise UserError(
            "a worker died; run the command again to go on, with fewer --jobs if memory was short"
        )


def _work(plan: Plan, out: Path, added: Sequence[Path], errors: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        for path in added:
            add_peer(path)
        work(plan, out)
    except UserError as error:
        errors.put(str(error))
    except KeyboardInterrupt:
        os._exit(1)


def _end_with_parent() -> None:
    """A killed command cannot end its workers, which would go on for days."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(plan: Plan, out: Path) -> None:
    """Makes what is left to do and nobody else is doing, until nothing is."""
    loaded: dict[str, Data] = {}
    idle = False
    while not idle:
        idle = True
        for job in jobs(of_now(read(out)), plan):
            with Claim(out, job) as mine:
                if not mine:
                    continue
                if job["set"] not in loaded:
                    loaded.clear()
                    loaded[job["set"]] = Data(*plan.source(job["set"]), *variant(job["set"]))
                append(out, do(job, loaded[job["set"]], of_now(read(out)), plan))
            # What comes next may follow from this one.
            idle = False
            break


class Data:
    """A data set as it is trained on.

    Args:
        data, label, fields: see `Plan.sets`.
        split, backbone: see `variant`.
    """

    def __init__(
        self, data: str, label: str, fields: str, split: str = "random", backbone: str = "dnn"
    ) -> None:
        self.source: Source = load_source(data)
        self._given = {"split": split, "backbone": backbone}
        self.label = label
        self.fields = [f.strip() for f in fields.split(",") if f.strip()]
        self.task: Task = prepare(self.config({}), self.source)
        self.size = Size(self.task.encoder.num_rows, len(self.task.encoder.fields))
        self.planted = _planted(data, self.task.encoder)
        self._taught: dict[int, Tensor] = {}

    def config(self, settings: dict[str, Any]) -> TrainConfig:
        """Settings of a run over those that the data asks for."""
        own = self.source.settings(settings.get("method", "fixed"))
        merged = {**own, **self._given, "dim": DIM, **settings}
        return TrainConfig(self.source.name, self.label, fields=self.fields, **merged)

    def teacher(self, seed: int, epochs: int | None = None) -> Tensor:
        """What tables of full size say of the training samples, once for each seed: `[n]`.

        Those that the product's own run trains, see `amtl.run.contenders.regularised`.
        """
        if seed not in self._taught:
            given = {} if epochs is None else {"epochs": epochs}
            config = self.config({"method": RULER, "seed": seed, "bits": "32", **given})
            teacher = Teacher()

            def add(entry: TrainConfig) -> float:
                learner = train(entry, self.task)
                teacher.add(learner)
                return float(best_record(learner)["score"])

            regularised(config, add)
            self._taught[seed] = teacher.labels()
        return self._taught[seed]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the full table."""
        return 4 * DIM * self.size.rows


def do(job: dict[str, Any], data: Data, records: Records, plan: Plan) -> dict[str, Any]:
    """Makes one run and returns its line."""
    contender = contenders()[job["method"]]
    cell = (job["set"], job["budget"], job["method"])
    tuning = "trial" in job
    if tuning:
        before = [r for r in tried(records, cell) if r["job"]["trial"] < job["trial"]]
        choice = _next_choice(contender, cell, before)
        assert choice is not None
        seed, task = TUNING_SEED, replace(data.task, test=data.task.val)
    else:
        choice, seed, task = job["choice"], job["seed"], data.task
    line: dict[str, Any] = {"job": job, "choice": choice}
    started, cpu = time.perf_counter(), time.process_time()
    try:
        settings = contender.settings(job["budget"], data.size, contender.completed(choice))
        if plan.epochs is not None:
            settings["epochs"] = plan.epochs
        config = data.config({**settings, "seed": seed})
        taught = data.teacher(seed, plan.epochs) if config.distillation else None
        learner = train(config, task, taught)
    except (UserError, DoesNotFit) as error:
        return {**line, "refused": str(error)}
    except Exception as error:
        if code_of(job["method"]) is None:
            raise
        raise UserError(_told(error, PEERS[job["method"]])) from error
    assert learner.best is not None
    record, config = learner.best["record"], learner.config
    line |= {
        "score": record["score"],
        "val_auc": record["val_auc"],
        "val_logloss": record["val_logloss"],
        "bytes": methods.server_bytes(learner.table),
        "dense_bytes": data.dense_bytes,
        "cpu": round(time.process_time() - cpu, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "epochs": round(learner.epochs, 2),
        "best_epoch": record["epoch"],
        "options": {
            **config.table_options,
            "bits": methods.number_bits(learner.table),
            "distillation": config.distillation,
            "embedding_dropout": config.embedding_dropout,
            "embedding_decay": config.embedding_decay,
        },
    }
    if code_of(job["method"]) is not None:
        line["unclaimed"] = _unclaimed(learner.table)
    return line if tuning else {**line, **_tested(learner, data)}


def _told(error: Exception, method: type[Peer]) -> str:
    """A mistake of a method that was added, and where it is in its file."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == method.file]
    where = f" (line {inside[-1].lineno}, in {inside[-1].name})" if inside else ""
    return f"--add {method.file}: {type(error).__name__}: {error}{where}"


def _unclaimed(table: Any) -> int:
    """How many numbers a method's module holds that are no part of what a server must keep.

    Nothing is wrong with some, as what training alone needs; but nobody has looked.
    """
    claimed = sum(part.count for part in table.parts())
    held = sum(tensor.numel() for tensor in (*table.parameters(), *table.buffers()))
    return max(0, held - claimed)


def train(config: TrainConfig, task: Task, taught: Tensor | None = None) -> Learner:
    """Trains a model to its end, after a race or a search where its settings ask for one.

    Args:
        config: settings.
        task: encoded data.
        taught: probability of a click for every training sample, for `config.distillation`.

    Raises:
        UserError: the settings do not fit, the loss is not finite, or no validation gave an AUC.
    """
    if is_open(config):
        trainer = Trainer(config, task)
        trainer.run()
        return trainer.learner
    trials = Trials(partial(Learner, task=task, taught=taught), Silent(), Learner.step)
    learner = trials.make(config)
    if is_search(learner.table):
        learner = search(learner, trials)
    run_to_end("", learner, trials)
    learner.end()
    learner.round_dense()
    return learner


def _tested(learner: Learner, data: Data) -> dict[str, Any]:
    """Scores on the test split, loss by rarity, calibration, and sizes against counts."""
    logits = predict(learner.model, data.task.test).double()
    labels = data.task.test.labels.double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    counts = data.task.encoder.counts()
    rows = data.task.test.rows.long()
    found: dict[str, Any] = {
        "test_auc": auc(logits, labels),
        "test_logloss": float(loss.mean()),
        "bias": float(torch.sigmoid(logits).mean() - labels.mean()),
        "ece": expected_calibration_error(torch.sigmoid(logits), labels),
    }
    if rows.shape[1]:
        order = torch.argsort(counts[rows].min(1).values, stable=True)
        found["loss_by_decile"] = [float(part.mean()) for part in loss[order].chunk(10)]
    bits = methods.row_bits(learner.table)
    if bits is not None:
        found["sizes"] = sizes_by_count(bits.double(), counts)
        if data.planted is not None:
            known = data.planted >= 0
            found["planted"] = rank_correlation(bits[known].double(), data.planted[known].double())
    return found


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Mean distance of prediction and frequency over ten bins of equally many samples."""
    order = torch.argsort(probabilities)
    distance = [
        len(part) * float((probabilities[part] - labels[part]).mean().abs())
        for part in order.chunk(_BINS)
    ]
    return sum(distance) / max(1, len(labels))


def sizes_by_count(bits: Tensor, counts: Tensor) -> list[list[float]]:
    """For each binary order of the count: mean count, mean bits of a row, rows."""
    order = torch.log2(counts.double() + 1).floor().long()
    return [
        [float(counts[here].double().mean()), float(bits[here].mean()), int(here.sum())]
        for here in (order == o for o in order.unique())
    ]


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's, None where one is constant."""
    from scipy import stats

    if float(a.std()) == 0 or float(b.std()) == 0:
        return None
    return float(stats.spearmanr(a.numpy(), b.numpy()).statistic)


def _planted(data: str, encoder: Encoder) -> Tensor | None:
    """Planted width of each row of generated data, -1 where there is none; None of other data."""
    name, _, rest = data.partition(":")
    level, _, rows = rest.partition(":")
    if name != "synthetic" or level not in ("easy", "medium", "hard"):
        return None
    truth = planted_widths(int(rows or 300_000), level=level)
    planted = torch.full((encoder.num_rows,), -1)
    for f, vocabulary in enumerate(encoder.vocabularies):
        own = truth.filter(pl.col("field") == encoder.names[f])
        local, _ = vocabulary.encode_counted(own["value"])
        known = local != vocabulary.oov_row
        width = torch.from_numpy(own["width"].to_numpy().copy())
        planted[encoder.field_rows(f)[local[known].long()]] = width[known]
    return planted
