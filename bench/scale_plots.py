"""How cost scales: time per lookup against rows, width, bag length and skew; peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import figures
from bench.results import Comparison, Report
from bench.tables import OPTIMIZERS, short_count

# Ours in blues and greens, peers in warm colours; a fused step looks like its lookup.
_COLOURS = {
    "torch": "#d9822b",
    "fbgemm": "#a33b3b",
    "amtl_search": "#1b6ca8",
    "amtl_masked": "#58a6c7",
    "amtl_frozen": "#1f7a4d",
    "amtl_search unfused": "#8e7cc3",
}
_OTHERS = ("#7a7a7a", "#b0a030", "#c06fa6", "#444444")
_MARKERS = {"torch": "s", "fbgemm": "D"}


@dataclass(frozen=True)
class _Axis:
    group: str
    field: str
    label: str
    logarithmic: bool = True


_AXES = (
    _Axis("scale rows", "rows", "rows of the table, N"),
    _Axis("scale width", "dim", "width of a row, D (floats)"),
    _Axis("scale bag", "bag_size", "lookups in a bag, L"),
    _Axis("scale skew", "exponent", "exponent of Zipf ids (0 is uniform)", logarithmic=False),
)


def _key(name: str) -> str:
    """What shares a colour: the fused form is a contender's usual step."""
    if name == "amtl_search":
        return "amtl_search unfused"
    return name.removesuffix("_fused")


class _Style:
    """Colours of contenders, the same in every panel."""

    def __init__(self) -> None:
        self._others: dict[str, str] = {}

    def line(self, name: str) -> dict[str, Any]:
        key = _key(name)
        colour = _COLOURS.get(key)
        if colour is None:
            place = len(self._others) % len(_OTHERS)
            colour = self._others.setdefault(key, _OTHERS[place])
        return {"color": colour, "marker": _MARKERS.get(key, "o"), "markersize": 4}


def _panels(title: str) -> tuple[Any, list[Any]]:
    figure, panels = figures.figure(12, 5.6, columns=2)
    figure.suptitle(title, fontsize=12)
    for panel in panels:
        panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... in figures instead of powers; more of them over few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low > 20 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _span(panel: Any, ratio: float) -> None:
    """At least this ratio from bottom to top, so that what is nearly flat looks flat."""
    low, high = panel.get_ylim()
    if high / low < ratio:
        middle = (low * high) ** 0.5
        panel.set_ylim(middle / ratio**0.5, middle * ratio**0.5)


def _ticks_at(panel: Any, values: Iterable[float]) -> None:
    from matplotlib.ticker import NullLocator

    places = sorted(set(values))
    labels = [short_count(int(v)) if v >= 1000 else f"{v:g}" for v in places]
    panel.set_xticks(places, labels)
    panel.xaxis.set_minor_locator(NullLocator())


def _legend(panel: Any, handles: Sequence[Any] | None = None) -> None:
    options = {"frameon": False, "fontsize": 8, "ncols": 2}
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
    if handles is None:
        panel.legend(**options, **where)
    else:
        panel.legend(handles=handles, **options, **where)


def _spread(values: Iterable[float]) -> str:
    found = sorted(set(values))
    shown = [short_count(int(v)) if v >= 1000 else f"{v:g}" for v in (found[0], found[-1])]
    return shown[0] if len(found) == 1 else f"{shown[0]} to {shown[1]}"


def _conditions(report: Report, entries: Sequence[Comparison], axis: _Axis) -> str:
    """What the other axes stood at."""
    cases = [entry.case for entry in entries]
    told = []
    if axis.field != "rows":
        told.append(f"N = {_spread(case['rows'] for case in cases)}")
    if axis.field != "dim":
        told.append(f"D = {_spread(case['dim'] for case in cases)}")
    if axis.field == "bag_size":
        told.append(f"{_spread(case['bags'] * case['bag_size'] for case in cases)} lookups a call")
    else:
        bags, length = (_spread(case[name] for case in cases) for name in ("bags", "bag_size"))
        told.append(f"{bags} bags of {length} a call")
    told.append(f"mean kept size {_spread(case['row_mean'] for case in cases)} D over rows")
    told.append(f"{_spread(case['threads'] for case in cases)} thread(s)")
    clock = "processor seconds" if report.settings.get("clock") == "cpu" else "wall time"
    return (
        f"{', '.join(told)}; {clock}, median and middle 80 % of the rounds. "
        f"{report.machine.get('cpu', '')}, {str(report.machine.get('date', ''))[:10]}."
    )


def _absences(report: Report, entries: Sequence[Comparison], axis: _Axis) -> list[str]:
    """Who is missing from a plot, where, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        place = entry.case[axis.field]
        shown = f"{short_count(place) if isinstance(place, int) else place}, {_ids(entry)}"
        where = f"{entry.case['work']} at {shown}"
        if entry.rejected:
            found.setdefault(("everybody", entry.rejected), []).append(where)
        for name, reason in entry.left_out.items():
            if name not in report.absent:
                found.setdefault((name, reason), []).append(where)
    lines = [
        f"Without {name} ({'; '.join(dict.fromkeys(places))}): {reason}."
        for (name, reason), places in found.items()
    ]
    taking_part = {name for entry in entries for name in entry.case["contenders"]}
    lines += [
        f"Absent: {name}: {reason}."
        for name, reason in report.absent.items()
        if name in taking_part
    ]
    return lines


def _ids(entry: Comparison) -> str:
    case = entry.case
    return f"Zipf {case['exponent']:g}" if case["distribution"] == "zipf" else "uniform"


def _curves(panel: Any, entries: Sequence[Comparison], axis: _Axis, style: _Style) -> None:
    from matplotlib.lines import Line2D

    curves: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    titles: dict[str, str] = {}
    for entry in entries:
        kind = "skew" if axis.field == "exponent" else _ids(entry)
        for name, timing in entry.timings.items():
            found = timing.summary
            values = (found.median, found.p10, found.p90)
            point = [value * 1e9 / timing.lookups for value in values]
            place = float(entry.case[axis.field])
            curves.setdefault((name, kind), []).append((place, point[0], point[1], point[2]))
            titles[name] = timing.title
    kinds = dict.fromkeys(kind for _, kind in curves)
    dashes: dict[str, Any] = dict(zip(kinds, ("-", "--", ":"), strict=False))
    for (name, kind), points in curves.items():
        points.sort()
        x, middle, low, high = zip(*points, strict=True)
        line = style.line(name)
        panel.plot(x, middle, linestyle=dashes.get(kind, "-."), **line)
        panel.fill_between(x, low, high, alpha=0.08, color=line["color"], linewidth=0)
    handles = [Line2D([], [], label=title, **style.line(name)) for name, title in titles.items()]
    if len(dashes) > 1:
        handles += [
            Line2D([], [], color="#444444", linestyle=dash, label=f"{kind} ids")
            for kind, dash in dashes.items()
        ]
    panel.set_yscale("log")
    _span(panel, 10.0)
    _plain_ticks(panel.yaxis)
    if axis.logarithmic:
        panel.set_xscale("log")
    _ticks_at(panel, [place for points in curves.values() for place, *_ in points])
    panel.set_xlabel(axis.label)
    panel.set_ylabel("time per lookup (ns)")
    _legend(panel, handles)


def _times(report: Report, axis: _Axis, path: Path) -> Path | None:
    entries = [entry for entry in report.comparisons if entry.case.get("group") == axis.group]
    usable = [entry for entry in entries if entry.timings and not entry.rejected]
    if not usable:
        return None
    figure, panels = _panels(f"Time per lookup against {axis.label}")
    style = _Style()
    steps = [entry for entry in usable if entry.case["work"] == "step"]
    lookups = [entry for entry in usable if entry.case["work"] == "forward"]
    kind = OPTIMIZERS[steps[0].case["optimizer"]] if steps else ""
    titles = (f"step: forward + backward + {kind} update", "lookup: forward only")
    for panel, part, title in zip(panels, (steps, lookups), titles, strict=True):
        panel.set_title(title, fontsize=10)
        if part:
            _curves(panel, part, axis, style)
        else:
            panel.set_axis_off()
    caption = [_conditions(report, usable, axis), *_absences(report, entries, axis)]
    return figures.save(figure, path, caption)


def _memory_panel(panel: Any, entries: Sequence[dict[str, Any]], field: str, style: _Style) -> None:
    curves: dict[str, list[tuple[float, float, float]]] = {}
    titles: dict[str, str] = {}
    for entry in entries:
        point = (entry[field], entry["extra_bytes"] / 1e6, entry["table_bytes"] / 1e6)
        curves.setdefault(entry["contender"], []).append(point)
        titles[entry["contender"]] = entry["title"]
    held: dict[str, tuple[Any, Any, str]] = {}
    for name, points in curves.items():
        points.sort()
        x, extra, table = zip(*points, strict=True)
        line = style.line(name)
        panel.plot(x, extra, label=f"{titles[name]}, a step", **line)
        if "frozen" in name:
            held["weights held, frozen"] = (x, table, line["color"])
        elif len(x) > len(held.get("weights held, everybody else", ((),))[0]):
            held["weights held, everybody else"] = (x, table, "#444444")
    for label, (x, table, colour) in held.items():
        panel.plot(x, table, linestyle="--", color=colour, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    _plain_ticks_if_short(panel)
    _ticks_at(panel, [place for points in curves.values() for place, *_ in points])
    panel.set_ylabel("MB (resident)")
    _legend(panel)


def _plain_ticks_if_short(panel: Any) -> None:
    """Figures on an axis of few decades; powers of ten in figures on a longer one."""
    from matplotlib.ticker import FuncFormatter

    low, high = panel.get_ylim()
    if high / low < 1e3:
        _plain_ticks(panel.yaxis)
    else:
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def memory(report: Report, path: Path) -> Path | None:
    """Peak memory of one step against rows and against width."""
    measured = [entry for entry in report.memory if entry["extra_bytes"] is not None]
    # Files of an earlier suite name no group; theirs is the axis of rows.
    rows = [entry for entry in measured if entry.get("group", "scale rows") == "scale rows"]
    widths = [entry for entry in measured if entry.get("group") == "scale width"]
    shared = {entry["rows"] for entry in widths}
    widths += [entry for entry in rows if entry["rows"] in shared]
    if len({entry["rows"] for entry in rows}) < 2:
        return None
    figure, panels = _panels("Peak memory of one step, and the weights it works on")
    style = _Style()
    for panel, part, field, label in (
        (panels[0], rows, "rows", _AXES[0].label),
        (panels[1], widths, "dim", _AXES[1].label),
    ):
        if not part:
            panel.set_axis_off()
            continue
        _memory_panel(panel, part, field, style)
        panel.set_xlabel(label)
        fixed = "dim" if field == "rows" else "rows"
        name = "D" if field == "rows" else "N"
        panel.set_title(f"{name} = {_spread(entry[fixed] for entry in part)}", fontsize=10)
    caption = [
        "Solid: high-water mark of resident memory during one step over what was resident before "
        "it, in a fresh process. Dashed: weights held.",
        *(f"Without {name}: {reason}." for name, reason in report.memory_left_out.items()),
    ]
    return figures.save(figure, path, caption)


def draw(report: Report, folder: Path, stem: str) -> list[Path]:
    """A plot an axis, and one of memory, as far as the file has data for them."""
    made = [
        _times(report, axis, folder / f"{stem}-{axis.group.replace(' ', '-')}.png")
        for axis in _AXES
    ]
    made.append(memory(report, folder / f"{stem}-scale-memory.png"))
    return [path for path in made if path is not None]
