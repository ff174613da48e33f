"""Trainings side by side: the same results, whatever happens to the processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.registry import Source
from amtl.errors import UserError
from amtl.run import ahead
from amtl.run.ahead import MOST, Ahead, side_by_side
from amtl.run.config import TrainConfig
from amtl.run.done import Interrupted
from amtl.run.learner import Learner
from amtl.run.model import predict
from amtl.run.preparation import prepare
from amtl.run.progress import Silent
from amtl.run.race import Trials, best_record
from amtl.run.training import start

ROWS = 3000


def clicks() -> Source:
    rng = np.random.default_rng(1)
    user, item = rng.zipf(1.3, ROWS) % 200, rng.zipf(1.3, ROWS) % 100
    logit = 2 * rng.normal(size=200)[user] + 2 * rng.normal(size=100)[item]
    frame = pl.DataFrame(
        {
            "user": user,
            "item": item,
            "label": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        }
    )
    return Source("made here", frame, "label")


@pytest.fixture(scope="module")
def source() -> Source:
    return clicks()


def settings(**changes) -> TrainConfig:
    base = {
        "data": "made here",
        "label": "label",
        "dim": 8,
        "budget": 0.25,
        "batch_size": 200,
        "epochs": 4,
        "validations": 2,
        "hidden": [16],
        "seed": 3,
        "values": False,
    }
    return TrainConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def task(source):
    return prepare(settings(), source)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of several threads differ in their last digits from those of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_times(found):
    if isinstance(found, dict):
        # A packed file holds some of them.
        left_out = ("seconds", "step_ms_median", "versions", "packed_bytes")
        return {k: without_times(v) for k, v in found.items() if k not in left_out}
    if isinstance(found, list):
        return [without_times(each) for each in found]
    return found


def processes() -> int:
    """How many this one has begun and not ended."""
    return len(ahead.multiprocessing.active_children())


class Begun:
    """Counts what is begun, and may do something to it."""

    def __init__(self, monkeypatch, then=lambda training: None):
        self.configs, begin = [], ahead._Training.begin

        def counted(training, *arguments):
            begin(training, *arguments)
            self.configs.append(training.config)
            then(training)

        monkeypatch.setattr(ahead._Training, "begin", counted)


@pytest.fixture(scope="module")
def alone(source):
    torch.set_num_threads(1)
    config = settings(compare=True, embedding_dropout=0.2)
    return without_times(start(config, source=source).run())


@pytest.mark.parametrize("jobs", [2, 4])
def test_results_are_those_of_one_training_after_the_other(source, alone, monkeypatch, jobs):
    begun = Begun(monkeypatch)
    # Trainings are over in less than what passes between two looks for a free core.
    monkeypatch.setattr(ahead, "_TELL", 0.0)
    config = settings(compare=True, embedding_dropout=0.2)
    found = start(config, source=source, jobs=jobs).run()
    assert without_times(found) == alone
    assert processes() == 0
    # Candidates, fewer bytes, full tables and taught ones, fixed width.
    assert len(begun.configs) >= 8
    assert {config.method for config in begun.configs} == {"amtl", "fixed"}
    assert any(config.distillation for config in begun.configs)


def test_what_dies_is_trained_by_who_asks(source, alone, monkeypatch):
    begun = Begun(monkeypatch, lambda training: training._process.kill())
    config = settings(compare=True, embedding_dropout=0.2)
    assert without_times(start(config, source=source, jobs=2).run()) == alone
    assert begun.configs


@pytest.mark.parametrize("told", [False, True])
def test_what_dies_goes_on_from_where_it_was(task, told):
    side = trials(task, 2)
    config = settings(race=False, embedding_dropout=0.3)
    expected, plain = Learner(config, task), Learner(config, task)
    here = Trials(None, Silent(), Learner.step)
    with side.ahead:
        here.train(expected, 10)
        side.expect(expected, steps=20)
        side.ahead.tend(0, 0.01)
        (training,) = side.ahead._all
        if told:
            # Its scores are there before it dies, and what they are of is asked for after that.
            side.train(expected, 20)
        training._process.kill()
        if told:
            side.hold(expected)
        side.train(expected, 30)
        here.train(plain, 30)
        assert torch.equal(says(expected), says(plain))
        assert without_times(expected.history) == without_times(plain.history)


def test_mistakes_are_told_as_without(task):
    side = trials(task, 2)
    config = settings(race=False, lr=1e30, bits="32")
    with side.ahead:
        side.expect(config)
        side.ahead.tend(0, 0.01)
        with pytest.raises(UserError, match="lower --table-lr"):
            side.train(side.make(config))
    assert processes() == 0


def test_a_run_stops_while_it_waits(source, monkeypatch):
    asked = []
    Begun(monkeypatch, asked.append)
    trainer = start(settings(), source=source, jobs=2, stop=lambda steps: len(asked) > 3)
    with pytest.raises(Interrupted):
        trainer.run()
    assert processes() == 0 and torch.get_num_threads() == 1


def test_time_that_is_up_ends_what_is_on_its_way(source):
    config = settings(epochs=100_000, patience=100_000, embedding_decay=1e-4)
    began = time.monotonic()
    metrics = start(config, source=source, jobs=2, time_limit=3.0).run()
    assert metrics["cut_short"] and time.monotonic() - began < 30
    assert math.isfinite(metrics["val_score"]) and processes() == 0


def says(learner):
    return predict(learner.model, learner.task.val)


def trials(task, jobs: int, **more) -> Trials:
    def make(config, taught=None):
        return Learner(config, task, taught=taught)

    told = more.pop("told", [])
    return Trials(
        make,
        Silent(),
        Learner.step,
        ahead=Ahead(make, jobs),
        tell=lambda *a: told.append(a),
        **more,
    )


def test_scores_come_first_and_numbers_where_they_are_asked_for(task):
    told = []
    side = trials(task, 2, told=told)
    config = settings(race=False, embedding_dropout=0.3)
    expected, plain = Learner(config, task), Learner(config, task)
    with side.ahead:
        side.expect(expected, steps=10)
        side.ahead.tend(0, 0.01)
        side.train(expected, 10)
        Trials(None, Silent(), Learner.step).train(plain, 10)
        scores = [record["score"] for record in plain.history]
        assert [record["score"] for record in expected.history] == scores
        assert expected.steps == 10 and best_record(expected)["score"] == max(scores)
        assert not torch.equal(says(expected), says(plain))
        side.hold(expected)
        assert torch.equal(says(expected), says(plain))
        # From here on in this process, with the same random numbers.
        side.train(expected, 20)
        Trials(None, Silent(), Learner.step).train(plain, 20)
        assert torch.equal(says(expected), says(plain))
    assert sum(steps for *_, steps, _ in told) <= 10 and told[-1][0] <= 10 / 12


def test_it_goes_on_where_it_is(task, monkeypatch):
    begun = Begun(monkeypatch)
    side = trials(task, 2)
    config = settings(race=False)
    expected, plain = Learner(config, task), Learner(config, task)
    with side.ahead:
        for steps in (12, 24, 36):
            side.expect(expected, steps=steps)
            side.ahead.tend(0, 0.01)
            side.train(expected, steps)
            assert expected.steps == steps
        side.hold(expected)
        Trials(None, Silent(), Learner.step).train(plain, 36)
        assert torch.equal(says(expected), says(plain))
    assert len(begun.configs) == 1


def test_what_is_let_go_of_and_what_is_forgotten_end(task):
    side = trials(task, 3)
    config = settings(race=False, epochs=100_000, patience=100_000)
    released, forgotten = Learner(config, task), settings(race=False, epochs=90_000)
    with side.ahead:
        side.expect(released, forgotten)
        side.ahead.tend(0, 0.01)
        assert processes() == 2
        side.forget(forgotten)
        assert processes() == 1
        released.release()
        side.ahead.tend(0, 0.01)
        assert processes() == 0
        # What was never expected is nobody's.
        side.forget(forgotten)


def test_cores_are_not_taken_twice(task):
    side = trials(task, 3)
    entries = [settings(race=False, seed=seed, epochs=100_000, patience=9999) for seed in range(5)]
    with side.ahead:
        side.expect(*entries[:2], later=True)
        side.expect(*entries[2:])
        side.ahead.tend(1, 0.01)
        assert [t.begun for t in side.ahead._all] == [False, False, True, True, False]
        side.ahead.tend(0, 0.01)
        assert [t.begun for t in side.ahead._all] == [False, False, True, True, True]


def test_several_threads_survive_the_fork(task):
    torch.set_num_threads(3)
    side = trials(task, 2)
    side = Trials(side.fresh, side.observer, side.step, ahead=Ahead(side.fresh, 2, threads=2))
    config = settings(race=False, epochs=2)
    first = Learner(config, task)
    side.train(first)
    with side.ahead:
        side.expect(config)
        side.ahead.tend(0, 0.01)
        (training,) = side.ahead._all
        until = time.monotonic() + 60
        while not training.ended and time.monotonic() < until:
            side.ahead.tend(0, 0.1)
        assert training.ended and not training.failed
    # And those of this process come back.
    side.train(Learner(config, task), 3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_processes_end_with_a_run_that_is_killed(tmp_path):
    code = f"""
import sys, time
sys.path[:0] = {[str(Path.cwd()), *sys.path]!r}
from tests.amtl import test_ahead as here
import torch
config = here.settings(race=False, epochs=10**6, patience=10**6)
task = here.prepare(config, here.clicks())
side = here.trials(task, 3)
side.expect(config, here.settings(race=False, epochs=10**6, patience=10**6, seed=9))
side.ahead.tend(0, 0.01)
print(*[t._process.pid for t in side.ahead._all], flush=True)
time.sleep(100)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as run:
        assert run.stdout is not None
        children = [int(pid) for pid in run.stdout.readline().split()]
        assert len(children) == 2 and all(alive(pid) for pid in children)
        run.kill()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (OSError, ProcessLookupError):
        return False


def test_ctrl_c_is_for_the_run(task):
    side = trials(task, 2)
    with side.ahead:
        side.expect(settings(race=False, epochs=2))
        side.ahead.tend(0, 0.01)
        (training,) = side.ahead._all
        os.kill(training._process.pid, signal.SIGINT)
        while not training.ended:
            side.ahead.tend(0, 0.1)
        assert not training.failed


def test_how_many_at_once(monkeypatch):
    config = settings()
    torch.set_num_threads(3)
    assert side_by_side(None, config, 1000, 2) == 3
    assert side_by_side(7, config, 1000, 2) == 7
    torch.set_num_threads(64)
    assert side_by_side(None, config, 1000, 2) == MOST
    assert side_by_side(2, settings(method="fixed", warm_start="x"), 1000, 2) == 1
    monkeypatch.setattr(ahead, "available_memory", lambda: 12 * 4 * 2 * 8 * 1_000_000)
    assert side_by_side(None, config, 1_000_000, 2) == 2
    assert side_by_side(None, config, 100_000_000, 2) == 1
