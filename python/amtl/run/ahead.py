"""Trainings side by side: what a run will likely ask for is begun in processes of their own.

A run tries settings one after the other, and what it tries next seldom depends on the one before.
So it says what it expects to ask for; cores that are free begin that, and when it is asked for, it
is there or on its way. What comes out is what one training after the other gives; a guess that was
wrong has cost nothing but electricity.

Processes are forked, so data are shared and nothing is loaded twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import multiprocessing
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.memory import available_memory, least_memory

MOST = 4
"""Trainings side by side by default, as there are seldom more that do not wait for each other."""

_TELL = 0.2
"""Seconds between two words from a training on how far it is."""

_COPIES = 5
"""Times the memory of a table and its optimizer that a training takes: with the average and the
best so far, and when all that is handed over."""

_FOR_GOOD = 2
"""`omp_pause_hard` of OpenMP 5.0."""

_Place = tuple[int, list[dict[str, Any]], dict[str, Any] | None]
"""Steps of a learner, its records and the best of them."""


def side_by_side(wanted: int | None, config: TrainConfig, rows: int, fields: int) -> int:
    """How many trainings a run may have at once.

    Args:
        wanted: as many, or None for one a thread of torch, up to `MOST`, as far as memory reaches.
        config: settings.
        rows: rows of the table.
        fields: embedded fields.
    """
    if config.warm_start is not None:
        return 1
    if wanted is not None:
        return wanted
    free, each = available_memory(), _COPIES * least_memory(config, rows, fields)
    fit = MOST if free is None else int(free // each)
    return max(1, min(MOST, torch.get_num_threads(), fit))


class _Training:
    """One training in a process of its own, or waiting for a free core.

    Args:
        config: settings.
        taught: a teacher's labels, see `Learner`.
        learner: what is trained, if it is made already.
        steps: how many it may take for now.
        later: whether others come first.
    """

    def __init__(
        self,
        config: TrainConfig,
        taught: Tensor | None,
        learner: Learner | None,
        steps: float,
        later: bool,
    ) -> None:
        self.config, self.taught, self.learner = config, taught, learner
        # Where it is in this process, whatever its own comes to.
        self.before: _Place = 0, [], None
        if learner is not None:
            self.before = learner.steps, list(learner.history), learner.best
        self.wanted, self.later = steps, later
        self.ended = False
        self.allowed = -math.inf
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.told: list[tuple[int, float, int, int]] = []
        self.state: bytes | None = None
        self._process: Any = None
        self.line: Connection | None = None

    @property
    def begun(self) -> bool:
        """Whether there is a process."""
        return self.allowed >= 0

    @property
    def failed(self) -> bool:
        """Whether its process ended without a word."""
        return self.ended and self.state is None

    @property
    def running(self) -> bool:
        """Whether a core is at it."""
        return self.begun and not self.ended and self.steps < self.allowed

    def begin(self, make: Callable[..., Learner], threads: int, others: Iterable[Any]) -> None:
        """Forks a process that trains."""
        self.line, theirs = multiprocessing.Pipe()
        closed = [self.line, *(other.line for other in others if other.line is not None)]
        if not _pause_threads():
            threads = 1
        self.allowed = self.wanted
        self._process = multiprocessing.get_context("fork").Process(
            target=_work, args=(theirs, closed, make, self, threads), daemon=True
        )
        # Ctrl-C is for the run to answer, and a thread that draws a bar is not needed in a child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def go_on(self) -> None:
        """Lets it take as many steps as are wanted."""
        self.allowed = self.wanted
        self._say(self.wanted)

    def stop(self) -> None:
        """Asks for its state after the step that it is at."""
        self._say(None)

    def _say(self, message: float | None) -> None:
        assert self.line is not None
        # A process that is gone is found to be so when it is listened to.
        with contextlib.suppress(OSError):
            self.line.send(message)

    def listen(self) -> None:
        """Takes in all that it has said."""
        assert self.line is not None
        try:
            while not self.ended and self.line.poll():
                kind, *what = self.line.recv()
                if kind == "state":
                    self.state, self.ended = self.line.recv_bytes(), True
                else:
                    self.steps, loss, samples, steps, records = what
                    self.told.append((self.steps, loss, samples, steps))
                    self.history += records
        except (EOFError, OSError):
            self.ended = True

    def kill(self) -> None:
        """Ends the process, if there is one."""
        self.ended = True
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self.line is not None:
            self.line.close()
            self.line = None


class Ahead:
    """What is trained ahead of being asked for.

    Args:
        make: a fresh learner of given settings and, as `taught`, a teacher's labels.
        jobs: trainings at once, the one of this process included.
        threads: of each.
    """

    def __init__(self, make: Callable[..., Learner], jobs: int, threads: int = 1) -> None:
        self._make, self.jobs, self._threads = make, jobs, threads
        self._all: list[_Training] = []
        self._looked = 0.0

    def expect(
        self,
        what: TrainConfig | Learner,
        taught: Tensor | None = None,
        steps: float = math.inf,
        later: bool = False,
    ) -> None:
        """Says that a training will be asked for, which begins once a core is free.

        Args:
            what: settings, or a learner that is there already.
            taught: a teacher's labels.
            steps: how many it may take for now.
            later: whether all others come first.
        """
        config, learner = (what, None) if isinstance(what, TrainConfig) else (what.config, what)
        known = self.of(learner) if learner is not None else self._find(config, taught)
        if known is not None:
            known.wanted, known.later = max(known.wanted, steps), known.later and later
            return
        self._all.append(_Training(config, taught, learner, steps, later))

    def forget(self, config: TrainConfig, taught: Tensor | None = None) -> None:
        """Ends a training that nobody will ask for; nothing if that was done, or never expected."""
        known = self._find(config, taught)
        if known is not None:
            self._drop(known)

    def of(self, learner: Learner) -> _Training | None:
        """The training of a learner, by which it is found from now on; None if there is none."""
        for training in self._all:
            if training.learner is learner:
                return training
        found = self._find(learner.config, learner.taught) if learner.steps == 0 else None
        if found is not None:
            found.learner = learner
        return found

    def _find(self, config: TrainConfig, taught: Tensor | None) -> _Training | None:
        for training in self._all:
            same = training.learner is None and training.taught is taught
            if same and training.config == config:
                return training
        return None

    def _drop(self, training: _Training) -> None:
        training.kill()
        self._all.remove(training)

    def tend(self, mine: int = 1, patience: float = 0.0) -> None:
        """Takes in what others have said, and begins what is expected while cores are free.

        Args:
            mine: trainings in this process.
            patience: seconds to wait for a word.
        """
        now = time.monotonic()
        if not patience and now - self._looked < _TELL:
            return
        self._looked = now
        for training in list(self._all):
            if training.learner is not None and training.learner.released:
                self._drop(training)
        lines = {t.line: t for t in self._all if t.line is not None and not t.ended}
        for line in wait(list(lines), patience) if lines else ():
            lines[line].listen()  # type: ignore[index]
        free = self.jobs - mine - sum(training.running for training in self._all)
        for training in sorted(self._all, key=lambda training: training.later):
            if free <= 0:
                break
            if not training.begun:
                training.begin(self._make, self._threads, self._all)
            elif not training.ended and training.wanted > training.allowed:
                training.go_on()
            else:
                continue
            free -= 1

    def train(
        self,
        learner: Learner,
        steps: float,
        late: Callable[[], bool],
        tell: Callable[..., None],
    ) -> bool:
        """Waits until a learner that was expected has taken so many steps, or has ended.

        One that is not at its end has its scores then, and no numbers: `hold` fetches them. Where
        the time is up it ends as it stands.

        Args:
            learner: fresh, or trained so before.
            steps: how many, from its start.
            late: whether the time is up.
            tell: is told of steps: the learner, its `epochs`, a loss, samples, steps, records.

        Returns:
            Whether it was expected, and is trained; if not, it is as it was when it was expected.
        """
        training = self.of(learner)
        if training is None:
            return False
        if not training.begun:
            # Nobody is faster than who asks.
            self._all.remove(training)
            return False
        if training.wanted < steps or (training.allowed < steps and not training.ended):
            training.wanted = max(training.wanted, steps)
            training.go_on()
        seen = len(learner.history)
        stopped = False
        while not training.ended and training.steps < steps:
            self.tend(0, _TELL)
            for taken, loss, samples, count in training.told:
                records = [r for r in training.history[seen:] if r["step"] <= taken]
                seen += len(records)
                tell(taken / learner.steps_per_epoch, loss, samples, count, records)
            training.told.clear()
            if training.history and late() and not stopped:
                training.stop()
                stopped = True
        return self._take(training, steps)

    def hold(self, learner: Learner) -> bool:
        """Fetches the numbers of a learner that `train` left where it was trained.

        Returns:
            Whether it has them; if not, it is as it was when it was expected.
        """
        training = self.of(learner)
        if training is None:
            return True
        training.stop()
        while not training.ended:
            self.tend(0, _TELL)
        return self._take(training, math.inf)

    def _take(self, training: _Training, steps: float) -> bool:
        """Hands a learner what its training has come to; see `train`."""
        learner = training.learner
        assert learner is not None
        if training.failed:
            # Whatever it died of is met again here, or is not.
            self._drop(training)
            learner.steps, learner.history, learner.best = training.before
            return False
        if training.ended and training.steps <= steps:
            assert training.state is not None
            learner.load_state(torch.load(io.BytesIO(training.state), weights_only=False))
            self._drop(training)
            return True
        learner.stand(min(training.steps, steps), training.history)
        return True

    def close(self) -> None:
        """Ends all that is left."""
        for training in list(self._all):
            self._drop(training)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _work(
    line: Connection,
    closed: Iterable[Connection],
    make: Callable[..., Learner],
    training: _Training,
    threads: int,
) -> None:
    """What the process of a training does.

    Where it fails it is silent: who asks trains for himself then, and fails, too, or does not.
    """
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Else this line would not end with the run, but with the last of all processes.
        for other in closed:
            other.close()
        torch.set_num_threads(threads)
        learner = training.learner or make(training.config, training.taught)
        torch.set_rng_state(learner.rng)
        for message in _steps(line, learner, training.wanted):
            line.send(message)
        state = io.BytesIO()
        torch.save(learner.state(), state)
        line.send(("state",))
        line.send_bytes(state.getbuffer())
    finally:
        # Nothing of the run that was forked is for this process to end.
        os._exit(0)


def _steps(line: Connection, learner: Learner, allowed: float) -> Iterator[tuple[Any, ...]]:
    """Takes steps until its end, or until it is told to stop, and says how far it is."""
    last, samples, steps = time.monotonic(), 0, 0
    while not learner.finished:
        waits = learner.steps >= allowed
        while waits or line.poll():
            message = line.recv()
            if message is None:
                return
            allowed = message
            waits = learner.steps >= allowed
        records = len(learner.history)
        loss, count = learner.step()
        samples, steps = samples + count, steps + 1
        now, new = time.monotonic(), learner.history[records:]
        if new or now - last > _TELL or learner.steps >= allowed:
            yield "steps", learner.steps, loss, samples, steps, new
            last, samples, steps = now, 0, 0


def _pause_threads() -> bool:
    """Ends the threads of OpenMP, which come back when needed; whether that was possible.

    A forked process believes that it has them, and GNU's would wait for them forever.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
        for path in set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*", maps)):
            if ctypes.CDLL(path).omp_pause_resource_all(_FOR_GOOD):
                return False
    except (OSError, AttributeError):
        return False
    return True
