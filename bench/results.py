"""The result format: what the runner writes and what compare, table and plot read."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.files import write_aside
from bench.stats import Ratio, Summary, paired_ratio

FORMAT = 1


class ResultFormatError(ValueError):
    """A file that is no result of this suite, or of a newer one."""


@dataclass
class Timing:
    """One contender's part in a comparison.

    Attributes:
        title: What tables show.
        ours: Whether it is this project's.
        samples: Seconds per call, one a round, ``[rounds]``; empty in a summary.
        lookups: Lookups per call.
        useful_bytes: Bytes that one call has to move (``bench.traffic``).
        share: Useful bytes per second over the measured copy bandwidth. On a CPU ``facts`` hold
            ``ceiling_share``, too: the same with bytes of uniformly chosen rows at their own rate;
            and ``place_share``, with cache lines and places of what lies apart at theirs.
        error: Largest relative difference from the equations, checked before timing.
        facts: Anything else: mean sizes, peak memory, bytes stored.
        kept: What is left of the samples in a summary.
    """

    title: str
    ours: bool
    samples: list[float]
    lookups: int
    useful_bytes: float
    share: float = 0.0
    error: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    kept: Summary | None = None

    @property
    def summary(self) -> Summary:
        """Median and percentiles in seconds."""
        return self.kept or Summary.of(self.samples)


@dataclass
class Comparison:
    """A case with everybody's timings.

    Attributes:
        case: Its fields, ``name`` and ``group`` among them.
        timings: By contender.
        left_out: Who did not take part, and why.
        baselines: Whom the others are compared with.
        thread_speedup: Probe with all threads over one, before and after.
        rejected: Why the timings must not be used; empty where they may.
        kept: In a summary, by contender, ratios over each baseline.
    """

    case: dict[str, Any]
    timings: dict[str, Timing]
    left_out: dict[str, str] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)
    thread_speedup: list[float] = field(default_factory=list)
    rejected: str = ""
    kept: dict[str, dict[str, Ratio]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The case's name."""
        return str(self.case["name"])

    def fused_or_not(self, name: str) -> str:
        """The fused form of one of ours where it took part: what its user would take."""
        fused = f"{name}_fused"
        return fused if fused in self.timings else name

    def ratio(self, of: str, against: str) -> Ratio | None:
        """Time of one contender over another's; None where either is missing."""
        if of not in self.timings or against not in self.timings:
            return None
        if self.kept:
            return self.kept[of].get(against)
        return paired_ratio(self.timings[of].samples, self.timings[against].samples)


@dataclass
class Report:
    """A result file.

    Attributes:
        suite: Name of the suite.
        machine: From :func:`bench.machine.describe`.
        ceilings: Measured bandwidths in bytes per second, by thread count.
        comparisons: All of them.
        absent: Contenders that this machine lacks: reason and how to install.
        memory: Peaks of single steps (``bench.memory``).
        memory_left_out: Whose peaks were not measured, by case and contender: why.
        startup: Import times in seconds.
        goals: Goals of the suite as they came out.
        settings: Of the run.
    """

    suite: str
    machine: dict[str, Any]
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    memory_left_out: dict[str, str] = field(default_factory=dict)
    startup: dict[str, float] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def find(self, name: str) -> Comparison | None:
        """The comparison of a case."""
        return next((entry for entry in self.comparisons if entry.name == name), None)

    def summarised(self) -> Report:
        """Without raw samples: percentiles, and ratios over baselines with their intervals."""
        found = copy.deepcopy(self)
        for entry in found.comparisons:
            entry.kept = {
                of: {
                    against: ratio
                    for against in entry.baselines
                    if against != of and (ratio := entry.ratio(of, against))
                }
                for of in entry.timings
            }
            for timing in entry.timings.values():
                timing.kept, timing.samples = timing.summary, []
        return found

    def write(self, path: Path) -> None:
        """Writes JSON; an interrupted write leaves an older file whole."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        for entry in content["comparisons"]:
            for timing in entry["timings"].values():
                timing["samples"] = _short(timing["samples"])
                kept = timing.pop("kept")
                if kept:
                    timing["kept"] = _short(kept.values())
            entry["kept"] = {
                of: {against: _short(ratio.values()) for against, ratio in row.items()}
                for of, row in entry["kept"].items()
            }
        write_aside(path, _compact(content))

    @classmethod
    def read(cls, path: Path) -> Report:
        """Reads a result file.

        Raises:
            ResultFormatError: It is not one, or was written by a newer suite.
        """
        try:
            content = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ResultFormatError(f"{path} is not a result file: {error}") from error
        if not isinstance(content, dict) or "format" not in content:
            raise ResultFormatError(f"{path} is not a result file: it states no format")
        if content.pop("format") != FORMAT:
            raise ResultFormatError(f"{path} has another format than {FORMAT}, of this suite")
        content["comparisons"] = [_comparison(entry) for entry in content["comparisons"]]
        return cls(**content)


def _comparison(entry: dict[str, Any]) -> Comparison:
    timings = {key: Timing(**value) for key, value in entry["timings"].items()}
    for timing in timings.values():
        if timing.kept:
            timing.kept = Summary(*timing.kept)
    kept = {
        of: {against: Ratio(*ratio) for against, ratio in row.items()}
        for of, row in entry.get("kept", {}).items()
    }
    return Comparison(**{**entry, "timings": timings, "kept": kept})


def _short(numbers: Iterable[float]) -> list[float]:
    return [value if isinstance(value, int) else float(f"{value:.5g}") for value in numbers]


def _compact(content: Any) -> str:
    """Indented JSON with lists of numbers on one line, so that diffs of result files stay short."""
    text = json.dumps(content, indent=1)
    lines: list[str] = []
    pending: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if pending is None:
            lines.append(line)
            if stripped.endswith("["):
                pending = []
            continue
        if stripped.startswith("]"):
            lines[-1] += " ".join(pending) + stripped
            pending = None
        elif stripped[:1] in "{[" or stripped.startswith('"'):
            lines.extend(f"{' ' * (len(line) - len(line.lstrip()))}{part}" for part in pending)
            lines.append(line)
            pending = [] if stripped.endswith("[") else None
        else:
            pending.append(stripped)
    return "\n".join(lines) + "\n"
