"""Regressions between two result files, judged by intervals."""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import Comparison, Report, ResultFormatError
from bench.stats import Ratio, Verdict, change_between, verdict


@dataclass(frozen=True)
class Change:
    """How one contender moved between two files.

    Attributes:
        case: Name of the case.
        contender: Who.
        change: New over old: of its time relative to ``relative_to`` where both files have that
            peer, which takes out a machine that was slower as a whole; of its time otherwise.
        relative_to: A peer, or empty.
        verdict: By the interval of ``change``.
    """

    case: str
    contender: str
    change: Ratio
    relative_to: str
    verdict: Verdict


@dataclass(frozen=True)
class Outcome:
    """All changes, and what could not be compared."""

    changes: list[Change]
    missing: list[str]
    added: list[str]

    @property
    def regressions(self) -> list[Change]:
        """Those that became slower."""
        return [change for change in self.changes if change.verdict == "slower"]


def _relative_samples(comparison: Comparison, of: str, peer: str) -> list[float]:
    mine = comparison.timings[of].samples
    if not peer:
        return mine
    theirs = comparison.timings[peer].samples
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def compare_reports(
    old: Report, new: Report, *, tolerance: float = 0.05, confidence: float = 0.99
) -> Outcome:
    """Compares our contenders case by case.

    A verdict needs the whole interval beyond the tolerance: a point estimate that moved, with an
    interval that did not, is noise. Peers are not judged; they are the yardstick.

    Args:
        old: The earlier file.
        new: The later one.
        tolerance: Relative change that does not matter.
        confidence: Of the intervals; high, since many are looked at together.

    Raises:
        ResultFormatError: One of them is a summary, whose samples are gone.
    """
    if any(entry.kept for entry in (*old.comparisons, *new.comparisons)):
        raise ResultFormatError("a summary cannot be compared: its samples are gone")
    changes, missing = [], []
    for before in old.comparisons:
        after = new.find(before.name)
        for name, timing in before.timings.items():
            if not timing.ours:
                continue
            if after is None or name not in after.timings:
                missing.append(f"{before.name}: {name}")
                continue
            if before.rejected or after.rejected:
                missing.append(f"{before.name}: {name} (a rejected run)")
                continue
            peers = [
                peer
                for peer in before.baselines
                if peer in before.timings and peer in after.timings
            ]
            peer = peers[0] if peers else ""
            change = change_between(
                _relative_samples(before, name, peer),
                _relative_samples(after, name, peer),
                confidence=confidence,
            )
            judged = verdict(change, tolerance=tolerance)
            changes.append(Change(before.name, name, change, peer, judged))
    known = {entry.name for entry in old.comparisons}
    added = [entry.name for entry in new.comparisons if entry.name not in known]
    return Outcome(changes, missing, added)
