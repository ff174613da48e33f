"""Stages that cannot spoil each other: a process, a time box, a log and a result file for each.

A stage's process is a fork of this one, which must never have touched a GPU: so every stage has a
context of its own, and PyTorch is imported once. What a stage has saved on its way is kept
however it ends, and its whole group of processes ends with it, and with this process, however that
ends: nobody holds a GPU that another run needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.files import write_aside

# Of Linux' prctl.
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
PATIENCE = 10.0
"""Seconds that killed processes get to end: a driver that hangs may hold them for ever."""

Save = Callable[[dict[str, Any]], None]


class LeftOutError(Exception):
    """A stage that has no business here, and why."""


@dataclass(frozen=True)
class Stage:
    """One thing to be proved or measured.

    Attributes:
        name: Of its files.
        limit: Seconds after which it is killed.
        work: Told where to save what it has found so far; returns or raises.
        needs: A stage without which this one is left out, unless that has ended ``ok``.
    """

    name: str
    limit: float
    work: Callable[[Save], None]
    needs: str = ""


@dataclass
class Result:
    """What has become of a stage.

    Attributes:
        name: Of the stage.
        outcome: ``ok``, ``failed``, ``killed`` (at its limit) or ``left out``.
        seconds: What it took.
        limit: What it had.
        detail: Why, or the end of its log.
        data: What it has saved.
    """

    name: str
    outcome: str
    seconds: float
    limit: float
    detail: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def path_of(folder: Path, stages: Sequence[Stage], stage: Stage) -> Path:
    """The result file, numbered as the stages are ordered."""
    return folder / f"{[each.name for each in stages].index(stage.name):02}-{stage.name}.json"


def read(path: Path) -> Result | None:
    """A result that was written; None where there is none."""
    try:
        return Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, content: Any) -> None:
    write_aside(path, json.dumps(content, indent=1) + "\n")


def _prctl(option: int, value: int) -> None:
    # Linux only; elsewhere stages outlive a harness that is killed by force.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _work(stage: Stage, saved: Path, log: Path) -> int:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    try:
        stage.work(lambda data: _write(saved, data))
    except LeftOutError as reason:
        print(f"left out: {reason}", flush=True)
        return 77
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _guard(stage: Stage, saved: Path, log: Path, parent: int) -> int:
    """Leads a group of processes, in which the stage works, and ends with it or with its parent.

    A process that works can answer no signal while a driver has it, and what it has started hears
    of no parent's end. This one does nothing else.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    _prctl(_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    worker = os.fork()
    if worker == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(_work(stage, saved, log))
    _, status = os.waitpid(worker, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _wait(child: int, seconds: float) -> int | None:
    """The exit code; None past the time."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


def _end(group: int) -> bool:
    """Kills all processes of a group; whether none is left after a while."""
    end = time.monotonic() + PATIENCE
    while True:
        # Those whose parents have ended are this process's.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)


def run(stage: Stage, path: Path, limit: float) -> Result:
    """Runs a stage in a process of its own and writes its result.

    Args:
        stage: The stage.
        path: Of the result; the log lies beside it.
        limit: Seconds; the process and all that it has started are killed then. What does not end
            even so is named in the result and left behind.
    """
    log, saved = path.with_suffix(".log"), path.with_suffix(".saved")
    for old in (path, log, saved):
        old.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    started, parent = time.monotonic(), os.getpid()
    _prctl(_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        os._exit(_guard(stage, saved, log, parent))
    code = _wait(child, limit)
    gone = _end(child)
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    data = json.loads(saved.read_text()) if saved.exists() else {}
    saved.unlink(missing_ok=True)
    outcome = {0: "ok", 77: "left out", None: "killed"}.get(code, "failed")
    detail = text[-4000:]
    if outcome == "ok":
        detail = text.splitlines()[-1] if text else ""
    elif outcome == "left out":
        detail = text.rpartition("left out: ")[2]
    elif outcome == "failed":
        # The guard's own signal, or the one of its worker as it was told.
        number = -code if code is not None and code < 0 else (code or 0) - 128
        detail += "".join(f"\nended by {each.name}" for each in signal.Signals if each == number)
    if not gone:
        detail += (
            f"\nsome of its processes (group {child}) have not ended {PATIENCE:.0f} s after a kill"
        )
    result = Result(stage.name, outcome, time.monotonic() - started, limit, detail, data)
    result.seconds = round(result.seconds, 2)
    _write(path, dataclasses.asdict(result))
    return result


def run_all(
    stages: Sequence[Stage],
    folder: Path,
    *,
    wanted: Sequence[str] = (),
    resume: bool = False,
    seconds: float = float("inf"),
    notice: Callable[[Result], object] = lambda result: None,
) -> list[str]:
    """Runs stages in order; each one's outcome is its own.

    One that would get less than half of its limit is left for another time.

    Args:
        stages: All of them.
        folder: Of the results.
        wanted: Beginnings of names of those to run; all if empty.
        resume: Whether those that have ended ``ok`` before are taken as they are.
        seconds: For everything.
        notice: Told of every result.

    Returns:
        Names of those that there was no time for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    late = []
    for stage in stages:
        if wanted and not any(stage.name.startswith(each) for each in wanted):
            continue
        path = path_of(folder, stages, stage)
        before = read(path)
        if resume and before is not None and before.outcome == "ok":
            continue
        needed = next((each for each in stages if each.name == stage.needs), None)
        if needed is not None:
            told = read(path_of(folder, stages, needed))
            if told is not None and told.outcome != "ok":
                detail = f"{stage.needs}: {told.outcome}"
                result = Result(stage.name, "left out", 0.0, 0.0, detail)
                _write(path, dataclasses.asdict(result))
                notice(result)
                continue
        left = end - time.monotonic()
        if left < stage.limit / 2:
            late.append(stage.name)
            continue
        notice(run(stage, path, min(stage.limit, left)))
    return late
