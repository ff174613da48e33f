"""Stages that cannot spoil each other: a process, a time box, a log and a result file for each.

A stage's process is a fork of this one, which must never have touched a GPU: so every stage has a
context of its own, and PyTorch is imported once. What a stage has saved on its way is kept
however it ends, and its whole group of processes ends with it.
"""

from __future__ import annotations

import contextlib
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


def _child(stage: Stage, saved: Path, log: Path) -> int:
    os.setsid()
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


def run(stage: Stage, path: Path, limit: float) -> Result:
    """Runs a stage in a process of its own and writes its result.

    Args:
        stage: The stage.
        path: Of the result; the log lies beside it.
        limit: Seconds; the process and all that it has started are killed then.
    """
    log, saved = path.with_suffix(".log"), path.with_suffix(".saved")
    for old in (path, log, saved):
        old.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_child(stage, saved, log))
    code = _wait(child, limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    data = json.loads(saved.read_text()) if saved.exists() else {}
    saved.unlink(missing_ok=True)
    outcome = {0: "ok", 77: "left out", None: "killed"}.get(code, "failed")
    detail = text[-4000:]
    if outcome == "ok":
        detail = text.splitlines()[-1] if text else ""
    elif outcome == "left out":
        detail = text.rpartition("left out: ")[2]
    elif outcome == "failed" and code is not None and code < 0:
        detail += f"\nended by {signal.Signals(-code).name}"
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
