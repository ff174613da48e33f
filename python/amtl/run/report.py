"""One self-contained HTML file about one or more runs."""

from __future__ import annotations

import html
import itertools
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amtl.errors import UserError
from amtl.peers import PEERS
from amtl.run.folders import require_no_file, require_no_part
from amtl.run.html import STYLE, html_page, html_table, require_matplotlib, section, svg
from amtl.store.files import read_json, write_text

COLORS = {"amtl": "#2563eb", "rule": "#d97706", "fixed": "#64748b"}
_PEER_COLORS = ["#0d9488", "#be185d", "#7c3aed", "#65a30d", "#dc2626", "#0891b2", "#92400e"]
_DASHES = ["-", "--", ":", "-."]


@dataclass(frozen=True)
class Result:
    """Runs that differ in the seed only.

    Attributes:
        name: what they are, in a few words.
        runs: their metrics.
    """

    name: str
    runs: list[dict[str, Any]]

    @property
    def method(self) -> str:
        """Their method."""
        return str(self.runs[0]["method"])

    def mean(self, key: str) -> float:
        """Mean of a number over seeds."""
        return statistics.fmean(float(run[key]) for run in self.runs)

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation over seeds, None with one seed."""
        if len(self.runs) < 2:
            return None
        return statistics.stdev(float(run[key]) for run in self.runs)

    def step_ms(self, phase: str) -> float | None:
        """Median step time of a phase, median over seeds."""
        values = [run["step_ms_median"][phase] for run in self.runs]
        present = [v for v in values if v is not None]
        return statistics.median(present) if present else None


def load_metrics(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Metrics of finished runs; a folder of runs stands for all finished runs in it.

    Raises:
        UserError: if a folder has none.
    """
    runs = []
    for folder in _run_folders(folders):
        require_no_file(folder)
        if not (folder / "metrics.json").exists():
            raise UserError(
                f"{folder} has no metrics.json: not a run, or not finished "
                f"(amtl train --resume --out {folder} goes on)"
            )
        runs.append(read_json(folder / "metrics.json"))
    return runs


def _run_folders(folders: Sequence[Path]) -> list[Path]:
    if not folders:
        raise UserError("name at least one run folder")
    expanded: list[Path] = []
    for folder in folders:
        if (folder / "metrics.json").exists():
            expanded.append(folder)
        else:
            expanded += sorted(path.parent for path in folder.glob("*/metrics.json")) or [folder]
    return expanded


def load_comparable(folders: Sequence[Path], command: str) -> list[dict[str, Any]]:
    """`load_metrics` of runs on one data set, with one label and one split.

    Args:
        folders: as there.
        command: `report` or `compare`, what the runs are for.

    Raises:
        UserError: if a folder has none, or if there are several data sets, labels or splits, so
            that AUCs are of other rows; it then has a command line for the runs of each.
    """
    expanded = _run_folders(folders)
    runs = load_metrics(expanded)
    groups: dict[tuple[str, ...], list[Path]] = {}
    for folder, run in zip(expanded, runs, strict=True):
        groups.setdefault(_tested_on(run["config"]), []).append(folder)
    if len(groups) > 1:
        values = zip(*groups, strict=True)
        differs = [len(set(of_all)) > 1 for of_all in values]
        what = " and one ".join(itertools.compress(("data set", "label", "split"), differs))
        lines = []
        for place, (tested_on, own) in enumerate(groups.items()):
            words = ["amtl", command, *map(str, own)]
            words += ["-o", f"report-{place}.html"] if command == "report" else []
            about = ", ".join(itertools.compress(tested_on, differs))
            lines.append(f"{shlex.join(words)}  ({about})")
        raise UserError(
            f"{command} is about one {what}, as AUCs of others do not compare, and these runs are "
            f"of {len(groups)}: " + "; ".join(lines)
        )
    return runs


def _tested_on(config: dict[str, Any]) -> tuple[str, ...]:
    """Data, label and split of a run in words: test scores of other ones do not compare."""
    label, split = f"label {config.get('label')}", f"split {config['split']}"
    threshold, positive = config.get("label_threshold"), config.get("label_positive")
    label += "" if threshold is None else f" from {threshold:g}"
    label += "" if positive is None else f" = {positive}"
    missing = config.get("label_missing")
    label += "" if missing is None else f", missing: {missing}"
    weight = config.get("weight")
    label += "" if weight is None else f", weighted by {weight}"
    drawn = config.get("negatives")
    label += "" if drawn is None else f", negatives: {drawn}"
    split += f" of seed {config.get('split_seed', 0)}" if config["split"] == "random" else ""
    return config["data"], label, split


def methods_in_order(names: Iterable[str]) -> list[str]:
    """Each once: fixed, methods of the field, rule, amtl."""
    peers = sorted(set(names) - set(COLORS))
    return ["fixed", *peers, "rule", "amtl"]


def color(method: str) -> str:
    """Of a method's lines."""
    if method in COLORS:
        return COLORS[method]
    place = [*PEERS, method].index(method)
    return _PEER_COLORS[place % len(_PEER_COLORS)]


def group_results(runs: Sequence[dict[str, Any]]) -> list[Result]:
    """Groups runs by everything but the seed: in the order of methods, by falling memory."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        run["config"].setdefault("backbone", "dnn")
        run["config"].setdefault("bits", "32")
        run["config"].setdefault("embedding_decay", None)
        run["config"].setdefault("masters", True)
        run["config"].setdefault("weight", None)
        config = {k: v for k, v in _asked(run).items() if k not in ("seed", "warm_start")}
        config["warm"] = bool(run["config"]["warm_start"])
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(run)
    order = methods_in_order(run["method"] for run in runs)
    ordered = sorted(
        groups.values(),
        key=lambda g: (order.index(g[0]["method"]), -g[0]["stored_bytes"], g[0]["dim"]),
    )
    names = [_name(group[0]) for group in ordered]
    results = []
    for group, name in zip(ordered, names, strict=True):
        if names.count(name) > 1:
            same = [g[0] for g, n in zip(ordered, names, strict=True) if n == name]
            name = f"{name}, {_difference(group[0], same)}"
        results.append(Result(name, group))
    return results


def _asked(run: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with what its race chose, which seeds may differ in, left open."""
    config, raced = run["config"], run.get("raced")
    if not raced or "given" not in raced:
        return dict(config)
    asked = {**config, "table_options": raced["given"], "budget": raced["budget"], "race": True}
    asked |= raced.get("asked", {})
    return asked


def _label(method: str) -> str:
    return "AMTL" if method == "amtl" else method


def _name(run: dict[str, Any]) -> str:
    name = f"{_label(run['method'])} D={run['dim']}"
    if run["config"]["bits"] not in ("32", "auto"):
        name += f" {run['config']['bits']} bits"
        name += "" if run["config"].get("masters", True) else " without masters"
    decay = _asked(run).get("embedding_decay")
    name += f" decay {decay:g}" if decay else ""
    if run["budget"] is not None:
        name += f" {100 * _asked(run)['budget']:.3g}%"
    elif run["method"] != "fixed":
        name += " no budget"
    if run["config"]["backbone"] != "dnn":
        name = f"{run['config']['backbone']}, {name}"
    if run["config"]["warm_start"]:
        name += ", warm start"
    return name


def _difference(run: dict[str, Any], same: Sequence[dict[str, Any]]) -> str:
    config, others = _asked(run), [_asked(other) for other in same]
    differing = [
        key
        for key in config
        if key not in ("seed", "warm_start") and any(o.get(key) != config[key] for o in others)
    ]
    return ", ".join(_setting(key, config[key]) for key in differing) or "again"


def _setting(key: str, value: Any) -> str:
    """A setting in a few words, however many columns there are."""
    if isinstance(value, Mapping):
        return " ".join(_setting(k, v) for k, v in value.items()) or f"no {key}"
    if key != "fields" and isinstance(value, Sequence) and not isinstance(value, str):
        return f"{key} of {len(value)}" if len(value) > 3 else f"{key} {list(value)}"
    if key != "fields":
        return f"{key} {value}"
    if not value:
        return "all fields"
    return f"{len(value)} fields" if len(value) > 3 else f"fields {' '.join(value)}"


def baseline(results: Sequence[Result]) -> Result | None:
    """The widest fixed-size model, of several the best by validation: what others are held to."""

    def worth(result: Result) -> tuple[float, float]:
        return result.mean("stored_bytes"), result.mean("val_auc")

    return max((r for r in results if r.method == "fixed"), key=worth, default=None)


def table_rows(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the results table, as text.

    Differences are to the widest fixed table; `ms/step` is the median in the search and in the
    frozen phase, `best` the epoch of the model kept.
    """
    base = baseline(results)
    many = any(len(result.runs) > 1 for result in results)
    header = ["model", "test AUC", *(["vs full"] if base else []), "logloss", "bytes", "of full"]
    header += ["ms/step", "best", *(["seeds"] if many else [])]
    rows = []
    for result in results:
        deviation = result.deviation("test_auc")
        area = result.mean("test_auc")
        row = [result.name, "–" if math.isnan(area) else f"{area:.4f}"]
        row[1] += "" if deviation is None or math.isnan(deviation) else f" ± {deviation:.4f}"
        if deviation is None and (error := _error(result)):
            row[1] += f" ± {error:.4f} s.e."
        if base:
            difference = area - base.mean("test_auc")
            row.append("–" if result is base or math.isnan(difference) else f"{difference:+.4f}")
        stored = result.mean("stored_bytes")
        full = base.mean("stored_bytes") if base else result.mean("dense_bytes")
        steps = [result.step_ms(phase) for phase in ("search", "frozen")]
        row += [
            f"{result.mean('test_logloss'):.4f}",
            f"{stored:,.0f}",
            f"{stored / full:.1%}",
            "/".join(f"{s:.1f}" for s in steps if s is not None),
            f"{result.mean('best_epoch'):.1f}",
            *([str(len(result.runs))] if many else []),
        ]
        rows.append(row)
    return header, rows


def _error(result: Result) -> float | None:
    """Standard error of the test AUC of a run, None where it has none, or in files before."""
    error = result.runs[0].get("test_auc_error")
    return None if error is None or math.isnan(error) else float(error)


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of the given run folders to `out`, atomically.

    Raises:
        UserError: if a run is unfinished, data sets differ, matplotlib is missing, or `out` is a
            file of a run.
    """
    require_no_part(out)
    runs = load_comparable(folders, "report")
    matplotlib = require_matplotlib()
    results = group_results(runs)
    with matplotlib.rc_context(STYLE):
        page = _page(results)
    write_text(out, page)


def _page(results: Sequence[Result]) -> str:
    runs = [run for result in results for run in result.runs]
    config = runs[0]["config"]
    title = Path(config["data"]).stem if "/" in config["data"] else config["data"]
    adaptive = [r for r in results if r.method != "fixed"]
    sections = [
        section(
            "Results",
            _summary(results)
            + html_table(*table_rows(results))
            + "<p class=note>ms/step: median step time, search / frozen; best: the epoch of the "
            "model that was kept, by validation AUC minus log loss.</p>",
        ),
        section(
            "AUC against memory",
            _figure(_plot_memory, results, (8.6, 4.2)),
            "Each point is one run; lines join the means of a method. Memory counts the "
            "embedding values, tier rounding included, on a logarithmic scale.",
        ),
    ]
    if adaptive:
        names = list(adaptive[-1].runs[0]["sizes"]["fields"])
        height = 2.5 * math.ceil(len(names) / 3)
        sections.append(
            section(
                "Kept size against frequency",
                _figure(_plot_sizes, adaptive, (10.5, max(height, 2.8))),
                "Mean stored numbers per value against its count in the training split, by "
                "field (first seed). The axis at the bottom is logarithmic.",
            )
        )
        sections.append(
            section(
                "How many values keep how much",
                _figure(_plot_histogram, adaptive, (8.6, 3.2)),
                "Rows of the table by stored width (first seed).",
            )
        )
    sections += [
        section(
            "Training curves",
            _figure(_plot_curves, results, (10.5, 3.8)),
            "Validation AUC and training loss (first seed). The dot marks the model that was kept; "
            "at a vertical tick training went back to the best model so far, froze its sizes and "
            "went on more slowly.",
        ),
        section(
            "Bytes by field",
            _figure(_plot_fields, results, (8.6, 4.2)),
            "Embedding bytes per field (first seed).",
        ),
        section("Settings", _settings(runs)),
    ]
    body = "\n".join(sections)
    return html_page(f"amtl report: {title}", title, _intro(runs), body)


def _intro(runs: Sequence[dict[str, Any]]) -> str:
    run = runs[0]
    fields = ", ".join(f"{k} ({v:,})" for k, v in run["rows_by_field"].items())
    synthetic = run["config"]["data"].startswith("synthetic")
    note = (
        " <strong>Synthetic data: generated, not measured anywhere.</strong>" if synthetic else ""
    )
    number = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    cut = sum(bool(other.get("cut_short")) for other in runs)
    if cut:
        note += f" Ended by --time-limit: {cut} of {len(runs)}."
    return (
        f"{number}; split {html.escape(_split(run))}{_tested(run)}; "
        f"{run['rows']:,} rows in the shared table: {html.escape(fields)}.{note}"
    )


def _tested(run: dict[str, Any]) -> str:
    """How many rows were tested on, where known."""
    held = (run.get("held_out") or {}).get("test")
    if not held:
        return ""
    weight = run.get("weight")
    by = "" if weight is None else f", weighted by {html.escape(repr(weight))}"
    return f", tested on {held['rows']:,} rows, {held['positive']:,} of them positive{by}"


def _split(run: dict[str, Any]) -> str:
    """How rows were split, with the shares of training, validation and test where known."""
    how, parts = run["config"]["split"], run.get("split_rows")
    if parts:
        shares = (f"{100 * rows / sum(parts.values()):.3g}" for rows in parts.values())
        return f"{how} {'/'.join(shares)}"
    return str(how) if how.startswith("column:") else f"{how} 80/10/10"


def _summary(results: Sequence[Result]) -> str:
    base = baseline(results)
    adaptive = [r for r in results if r.method == "amtl"]
    if not base or not adaptive:
        return ""
    best = max(adaptive, key=lambda r: r.mean("val_auc"))
    saved = 1 - best.mean("stored_bytes") / base.mean("stored_bytes")
    difference = best.mean("test_auc") - base.mean("test_auc")
    cards = [
        (f"{saved:.0%}", f"less embedding memory than {base.name}"),
        (f"{difference:+.4f}", f"test AUC against {base.name}"),
        (f"{best.mean('test_auc'):.4f}", f"test AUC of {best.name}{_give_or_take(best)}"),
    ]
    inner = "".join(
        f"<div class=card><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>"
        for a, b in cards
    )
    return (
        f"<div class=cards>{inner}</div><p class=note>Shown: the AMTL run with the best "
        "validation AUC. The test split was scored once per run, after training.</p>"
    )


def _give_or_take(result: Result) -> str:
    error = _error(result)
    return "" if error is None else f", ± {error:.4f} s.e.: a smaller difference may be chance"


def _settings(runs: Sequence[dict[str, Any]]) -> str:
    configs = [run["config"] for run in runs]
    rows = []
    for key in configs[0]:
        values: list[str] = []
        for config in configs:
            text = json.dumps(config.get(key))
            if text not in values:
                values.append(text)
        rows.append([key, ", ".join(values)])
    made_with = ", ".join(f"{k} {v}" for k, v in runs[0]["versions"].items())
    table = html_table(["setting", "value"], rows)
    details = f"<details><summary>All settings</summary>{table}</details>"
    return f"{details}<p class=note>{html.escape(made_with)}</p>"


def _figure(
    draw: Callable[[Any, Sequence[Result]], None],
    results: Sequence[Result],
    size: tuple[float, float],
) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure, results)
    return svg(figure, draw.__name__.strip("_"))


def _style(results: Sequence[Result], result: Result) -> dict[str, Any]:
    same = [r for r in results if r.method == result.method]
    return {
        "color": color(result.method),
        "linestyle": _DASHES[same.index(result) % len(_DASHES)],
    }


def _plot_memory(figure: Any, results: Sequence[Result]) -> None:
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    for method in methods_in_order(r.method for r in results):
        # A test split of one class has no AUC, and no place here.
        told = [r for r in results if r.method == method and not math.isnan(r.mean("test_auc"))]
        own = sorted(told, key=lambda r: r.mean("stored_bytes"))
        if not own:
            continue
        tint = color(method)
        axes.plot(
            [r.mean("stored_bytes") for r in own],
            [r.mean("test_auc") for r in own],
            color=tint,
            linewidth=1.6,
            alpha=0.8,
            label=_label(method),
            marker="o",
            markersize=7,
            markeredgecolor="white",
        )
        points = [(run["stored_bytes"], run["test_auc"]) for r in own for run in r.runs]
        axes.scatter(*zip(*points, strict=True), s=12, color=tint, alpha=0.5)
        for r in own:
            axes.annotate(
                r.name.split(" ", 1)[1],
                (r.mean("stored_bytes"), r.mean("test_auc")),
                xytext=(6, 6 if method != "rule" else -12),
                textcoords="offset points",
                fontsize=8,
                color=tint,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: _bytes(value))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("embedding memory")
    axes.set_ylabel("test AUC")
    axes.margins(0.12, 0.15)
    if axes.lines:
        axes.legend(loc="best")


def _plot_sizes(figure: Any, results: Sequence[Result]) -> None:
    names = list(results[-1].runs[0]["sizes"]["fields"])
    columns = min(3, len(names))
    grid = figure.subplots(
        math.ceil(len(names) / columns), columns, sharey=True, squeeze=False
    ).flatten()
    for axes, name in zip(grid, names, strict=False):
        for result in results:
            entry = result.runs[0]["sizes"]["fields"].get(name)
            if entry is None:
                continue
            x = [c + 1 for c in entry["count"]]
            axes.plot(
                x,
                entry["size"],
                marker="o",
                markersize=3,
                linewidth=1.3,
                label=result.name,
                **_style(results, result),
            )
        axes.set_xscale("log")
        axes.set_title(name, fontsize=10, color="#0f172a")
    for axes in grid[len(names) :]:
        axes.axis("off")
    for axes in grid[::columns]:
        axes.set_ylabel("stored numbers")
    for axes in grid[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("count in training + 1")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))


def _plot_histogram(figure: Any, results: Sequence[Result]) -> None:
    axes = figure.subplots()
    width = 0.8 / len(results)
    for i, result in enumerate(results):
        histogram = result.runs[0]["sizes"]["histogram"]
        x = [int(k) + (i - (len(results) - 1) / 2) * width for k in histogram]
        style = _style(results, result)
        solid = style["linestyle"] == "-"
        axes.bar(
            x,
            list(histogram.values()),
            width,
            label=result.name,
            color=style["color"],
            alpha=1.0 if solid else 0.45,
            edgecolor=style["color"],
            linewidth=0.5,
        )
    axes.set_yscale("log")
    axes.set_xlabel("stored numbers per value")
    axes.set_ylabel("values")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", ncols=2)


def _plot_curves(figure: Any, results: Sequence[Result]) -> None:
    left, right = figure.subplots(1, 2)
    for result in results:
        run = result.runs[0]
        style = _style(results, result)
        history = run["history"]
        epochs = [r["epoch"] for r in history]
        values = [r["val_auc"] for r in history]
        left.plot(epochs, values, linewidth=1.5, label=result.name, **style)
        best = epochs.index(run["best_epoch"])
        left.plot(
            [epochs[best]],
            [values[best]],
            "o",
            color=style["color"],
            markersize=6,
            markeredgecolor="white",
        )
        for before, after in itertools.pairwise(history):
            if after["stage"] > before["stage"]:
                left.plot(
                    [(before["epoch"] + after["epoch"]) / 2],
                    [(before["val_auc"] + after["val_auc"]) / 2],
                    marker="|",
                    markersize=14,
                    color=style["color"],
                    markeredgewidth=1.5,
                )
        losses = [math.nan if r["loss"] is None else r["loss"] for r in history]
        right.plot(epochs, losses, linewidth=1.5, **style)
    left.set_ylabel("validation AUC")
    right.set_ylabel("training loss")
    every = sorted(v["val_auc"] for r in results for v in r.runs[0]["history"])
    left.set_ylim(bottom=max(every[0], every[len(every) // 8]) - 0.002)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))


def _plot_fields(figure: Any, results: Sequence[Result]) -> None:
    axes = figure.subplots()
    names = sorted(
        results[0].runs[0]["bytes_by_field"],
        key=lambda n: results[0].runs[0]["bytes_by_field"][n],
        reverse=True,
    )
    palette = [
        "#1e3a8a",
        "#2563eb",
        "#0891b2",
        "#0d9488",
        "#65a30d",
        "#ca8a04",
        "#ea580c",
        "#dc2626",
        "#be185d",
        "#7c3aed",
    ]
    shown = names[: len(palette) - 1]
    rest = names[len(palette) - 1 :]
    start = [0.0] * len(results)
    parts = [(n, [n]) for n in shown] + ([("others", rest)] if rest else [])
    for color, (label, members) in zip(palette, parts, strict=False):
        sizes = [
            float(sum(r.runs[0]["bytes_by_field"].get(m, 0) for m in members)) for r in results
        ]
        axes.barh(range(len(results)), sizes, left=start, label=label, color=color, height=0.65)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    for i, total in enumerate(start):
        axes.annotate(
            _bytes(total),
            (total, i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="#334155",
        )
    axes.set_yticks(range(len(results)), [r.name for r in results])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: _bytes(value))
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}"
        value /= 1000
    return ""
