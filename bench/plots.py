"""Plots of a result file: ratio bars with intervals, a roofline, and those of ``scale_plots``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import figures, scale_plots
from bench.results import Comparison, Report
from bench.stats import Ratio
from bench.tables import describe_case

_OURS = "#1b6ca8"
_PEER = "#9a9a9a"


def _usable(report: Report) -> list[Comparison]:
    return [entry for entry in report.comparisons if entry.timings and not entry.rejected]


def ratio_bars(report: Report, path: Path) -> Path | None:
    """Time over the first baseline: a heading a case, a bar a contender, intervals as whiskers."""
    lines: list[tuple[str, Ratio | None, bool]] = []
    for comparison in _usable(report):
        if str(comparison.case.get("group", "")).startswith("scale"):
            continue
        baseline = next((b for b in comparison.baselines if b in comparison.timings), None)
        if baseline is None:
            continue
        heading = f"{describe_case(comparison.case)}; against {comparison.timings[baseline].title}"
        lines.append((heading, None, False))
        for name, timing in comparison.timings.items():
            ratio = comparison.ratio(name, baseline)
            if name != baseline and ratio is not None:
                lines.append((timing.title, ratio, timing.ours))
    bars = [(place, *line) for place, line in enumerate(lines)]
    if not bars:
        return None
    figure, [axes] = figures.figure(10, 0.17 * len(bars) + 0.8)
    ticks = []
    for place, label, ratio, ours in bars:
        if ratio is None:
            axes.text(
                0, place, label, transform=axes.get_yaxis_transform(), fontsize=6.5,
                fontweight="bold", va="center",
            )  # fmt: skip
            continue
        ticks.append((place, label))
        spread = [[max(ratio.value - ratio.low, 0)], [max(ratio.high - ratio.value, 0)]]
        axes.barh(
            place, ratio.value - 1, left=1, xerr=spread, color=_OURS if ours else _PEER,
            height=0.75, error_kw={"elinewidth": 1, "ecolor": "black"},
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=6.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("time over the baseline's: bars to the left are faster")
    return figures.save(figure, path)


def roofline(report: Report, path: Path) -> Path | None:
    """Useful bytes against time, below the measured ceilings; hollow: those behind a GPU's L2."""
    timings = [
        timing
        for comparison in _usable(report)
        for timing in comparison.timings.values()
        if timing.useful_bytes > 1e5
    ]
    entries = [(each.useful_bytes, each.summary.median, each.ours) for each in timings]
    floors = [
        (each.facts["floor_bytes"], each.summary.median, each.ours)
        for each in timings
        if "floor_bytes" in each.facts
    ]
    if not entries:
        return None
    figure, [axes] = figures.figure(7, 5)
    for found, behind in ((entries, ""), (floors, ", behind the L2")):
        for ours, colour, label in ((False, _PEER, "peers"), (True, _OURS, "amtl")):
            chosen = [entry for entry in found if entry[2] is ours]
            if behind and not chosen:
                continue
            axes.scatter(
                [size / 1e6 for size, _, _ in chosen],
                [size / seconds / 1e9 for size, seconds, _ in chosen],
                s=16, edgecolors=colour, facecolors="none" if behind else colour,
                label=label + behind, alpha=0.8,
            )  # fmt: skip
    # By threads, or of a GPU.
    most = max(report.ceilings, key=lambda of: int(of) if of.isdigit() else 0, default=None)
    for kind, value in (report.ceilings.get(most, {}) if most else {}).items():
        axes.axhline(value / 1e9, linewidth=0.8, linestyle="--", color="black")
        axes.text(
            0.01, value / 1e9, kind, transform=axes.get_yaxis_transform(), va="bottom", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful MB per call")
    axes.set_ylabel("useful GB/s")
    axes.legend(frameon=False)
    return figures.save(figure, path)


def draw(report: Report, folder: Path, stem: str) -> list[Path]:
    """Every plot that the file has data for."""
    single: list[tuple[Callable[[Report, Path], Path | None], str]] = [
        (ratio_bars, "ratios"),
        (roofline, "roofline"),
    ]
    made = [maker(report, folder / f"{stem}-{name}.png") for maker, name in single]
    return [path for path in made if path is not None] + scale_plots.draw(report, folder, stem)
