"""The command line: all commands but ``gpu``, which has its own."""

from __future__ import annotations

import dataclasses
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bench import binding, breakdown, device, guards, machine, memory, plots, tables
from bench.compare import compare_reports
from bench.files import write_aside
from bench.inputs import Case
from bench.oracle import MismatchError
from bench.plan import Budget, Cost, Plan, admit, make_plan
from bench.results import Comparison, Report, ResultFormatError
from bench.runner import Runner, cpu_clock, wall_clock
from bench.suites import SUITES, backward, evaluate, select
from bench.traffic import LINE

app = typer.Typer(
    help="Benchmarks of amtl_kernels against its peers, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(guards.app, name="guards")
console = Console()
NOISY_EXIT = 3
_ONE_THREAD = "processor seconds tell the time of one thread: add --threads 1"


class CallRate(ProgressColumn):
    """Calls per second so far."""

    def render(self, task: Task) -> Text:
        """The rate, or a dash before the first calls."""
        calls = task.fields.get("calls", 0)
        elapsed = task.elapsed or 0.0
        return Text(f"{calls / elapsed:,.0f} calls/s" if calls and elapsed else "– calls/s")


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        CallRate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _print_comparison(comparison: Comparison) -> None:
    table = Table(title=tables.describe_case(comparison.case), title_justify="left", box=None)
    baselines = [name for name in comparison.baselines if name in comparison.timings]
    for heading in ("contender", "ms", "P10", "P90", "ns/lookup", "of copy", "of ceiling"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for name in baselines:
        table.add_column(f"time / {name}", justify="right")
    for name, timing in comparison.timings.items():
        summary = timing.summary
        cells = [
            timing.title,
            f"{summary.median * 1e3:.3f}",
            f"{summary.p10 * 1e3:.3f}",
            f"{summary.p90 * 1e3:.3f}",
            f"{summary.median / timing.lookups * 1e9:.1f}",
            f"{timing.share:.0%}",
            f"{timing.facts['ceiling_share']:.0%}" if "ceiling_share" in timing.facts else "–",
        ]
        for baseline in baselines:
            ratio = comparison.ratio(name, baseline)
            assert ratio is not None
            cells.append(
                "1"
                if name == baseline
                else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            )
        table.add_row(*cells, style="bold" if timing.ours else None)
    console.print(table)
    for name, reason in comparison.left_out.items():
        console.print(f"  [dim]without {name}: {reason}[/dim]")
    if comparison.rejected:
        console.print(f"  [red]rejected: {comparison.rejected}[/red]")
    console.print()


@app.command()
def run(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "quick",
    only: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name holds this; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result file (JSON).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Timed seconds per case.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Run every case with this many threads.")
    ] = None,
    huge_pages: Annotated[
        bool, typer.Option("--huge-pages", help="Run every case with all tables on huge pages.")
    ] = False,
    clock: Annotated[
        str,
        typer.Option(help="wall, or cpu: processor seconds, for shared machines and one thread."),
    ] = "wall",
    peaks: Annotated[bool, typer.Option(help="Measure peak memory and import times too.")] = True,
    dry_run: Annotated[
        bool, typer.Option(help="Only list the cases, with estimated minutes and gigabytes.")
    ] = False,
    note: Annotated[str, typer.Option(help="A remark kept in the result.")] = "",
) -> None:
    """Measures a suite, prints it, and writes a result file."""
    if suite not in SUITES:
        raise typer.BadParameter(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    warnings.filterwarnings("ignore")
    chosen = select(SUITES[suite](), only or [])
    everywhere: dict[str, Any] = {}
    if threads is not None:
        everywhere["threads"] = threads
    if huge_pages:
        everywhere["huge_pages"] = True
    cases = dict.fromkeys(dataclasses.replace(case, **everywhere) for case in chosen.cases)
    chosen = dataclasses.replace(chosen, cases=list(cases))
    if not chosen.cases and not (peaks and chosen.memory):
        raise typer.BadParameter("no case matches")
    if clock not in ("wall", "cpu"):
        raise typer.BadParameter("the clock is wall or cpu")
    if clock == "cpu" and any(case.threads > 1 for case in chosen.cases):
        raise typer.BadParameter(_ONE_THREAD)
    on_gpu = {case.device for case in chosen.cases} == {"cuda"}
    if on_gpu and not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU here: python -m bench gpu --dry-run rehearses without one")
    budget = Budget(seconds if seconds is not None else chosen.seconds)
    if suite == "tiny":
        budget = Budget(budget.seconds, minimal_rounds=3, maximal_rounds=5)
    runner = Runner()
    plan = make_plan(chosen, runner.willing, runner.available(), budget.seconds, peaks=peaks)
    if dry_run:
        _print_plan(plan)
        return
    started = time.perf_counter()
    report = Report(suite, machine.describe())
    counts = sorted({case.threads for case in chosen.cases if case.device == "cpu"})
    cores = len(binding.allowed_cpus())
    with console.status("measuring this machine's ceilings"):
        megabytes = 16 if suite == "tiny" else 512
        report.ceilings = {
            str(count): machine.ceilings(count, megabytes=megabytes)
            for count in counts
            if count <= cores
        }
    if on_gpu:
        runner, report.ceilings = device.runner(budget)
    else:
        runner = Runner(
            budget=budget,
            ceilings=report.ceilings,
            probe=None if suite == "tiny" else machine.ThreadProbe(),
            timer=cpu_clock if clock == "cpu" else wall_clock,
            cache_bytes=machine.last_level_cache_bytes(),
            sector=LINE,
        )
    report.absent = runner.absent()
    report.settings = {"seconds_per_case": budget.seconds, "clock": clock, "note": note}
    for name, reason in report.absent.items():
        console.print(f"[yellow]absent: {name}: {reason}[/yellow]")
    failures = []
    took: dict[str, float] = {}
    path = out or Path("runs") / "bench" / f"{suite}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    with _progress() as progress:
        task = progress.add_task("", total=len(chosen.cases), calls=0)
        calls = 0
        for number, case in enumerate(chosen.cases):
            progress.update(task, description=case.name)
            begun = time.perf_counter()

            def notice(share: float, made: int, number: int = number) -> None:
                nonlocal calls
                calls += made
                progress.update(task, completed=number + share, calls=calls)

            try:
                comparison = runner.run(case, notice)
            except MismatchError as error:
                failures.append(f"{case.name}: {error}")
                console.print(f"[red]{failures[-1]}[/red]")
                continue
            report.comparisons.append(comparison)
            took[case.name] = round(time.perf_counter() - begun, 2)
            progress.update(task, completed=number + 1)
            _print_comparison(comparison)
            # What is killed leaves what it has measured.
            report.settings["unfinished"] = f"{number + 1} of {len(chosen.cases)} cases"
            report.write(path)
    report.settings.pop("unfinished", None)
    runner.forget()
    if peaks:
        with _progress() as progress:
            task = progress.add_task("peak memory", total=len(chosen.memory) + 1, calls=0)
            for case in chosen.memory:
                _measure_peaks(case, runner, report)
                progress.advance(task)
            if suite != "tiny":
                report.startup = memory.startup()
            progress.advance(task)
    report.goals = evaluate(report)
    report.settings["wall_seconds"] = round(time.perf_counter() - started, 1)
    report.settings["estimated_seconds"] = round(plan.seconds, 1)
    report.settings["case_seconds"] = took
    _print_goals(report)
    report.write(path)
    console.print(
        f"{path}, {report.settings['wall_seconds'] / 60:.1f} minutes "
        f"(estimated {plan.seconds / 60:.1f})"
    )
    if failures:
        console.print(f"[red]{len(failures)} case(s) were not timed: outputs differ[/red]")
        raise typer.Exit(1)
    rejected = [entry.name for entry in report.comparisons if entry.rejected]
    if rejected:
        console.print(f"[red]{len(rejected)} rejected run(s): use nothing of them[/red]")
        raise typer.Exit(NOISY_EXIT)


def _measure_peaks(case: Case, runner: Runner, report: Report) -> None:
    willing, left_out = runner.willing(case)
    for contender in willing:
        # Its process is alone with its copies, so each is let in by itself.
        refused = admit(case, [contender], machine.available_bytes()).left_out
        left_out.update(refused)
        if not refused:
            report.memory.append(memory.measure(case.as_dict(), contender.name))
    for name, reason in left_out.items():
        report.memory_left_out[f"{case.name}, {name}"] = reason


def _print_plan(plan: Plan) -> None:
    typer.echo("minutes  peak GB  case")
    total = Cost(plan.seconds, plan.peak_bytes, {})
    for name, cost in [*plan.costs, ("in total", total)]:
        typer.echo(f"{cost.seconds / 60:7.2f}  {cost.peak_bytes / 1e9:7.1f}  {name}")
    for (contender, reason), cases in plan.left_out().items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases, the first {cases[0]}"
        typer.echo(f"without {contender}: {reason} ({where})")
    typer.echo("Estimates for a quiet machine; nothing was measured.")


def _print_goals(report: Report) -> None:
    if report.goals:
        table = Table(title="Goals", title_justify="left", box=None)
        for heading in ("goal", "case", "wanted", "measured", "reached"):
            table.add_column(heading, overflow="fold")
        for goal in report.goals:
            table.add_row(
                str(goal["goal"]),
                str(goal["case"]),
                *tables.goal_cells(goal),
                "yes" if goal["reached"] else "no",
                style=None if goal["reached"] else "yellow",
            )
        console.print(table)
    for name, told in report.startup.items():
        beyond = "" if name == "torch" else " beyond torch"
        console.print(f"import {name}: {told * 1e3:.0f} ms{beyond}")


def _read(path: Path) -> Report:
    """A result file; its goals are judged as they stand today."""
    try:
        report = Report.read(path)
    except (OSError, ResultFormatError) as error:
        raise typer.BadParameter(str(error)) from error
    report.goals = evaluate(report)
    return report


@app.command("breakdown")
def break_down(
    ids: Annotated[str, typer.Option(help="uniform or zipf.")] = "uniform",
    rows: Annotated[int, typer.Option(help="Of the table, which is 64 wide.")] = 2_000_000,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    seconds: Annotated[float, typer.Option(help="Of each of two rounds of timing.")] = 8.0,
    clock: Annotated[str, typer.Option(help="wall, or cpu: see run.")] = "wall",
    step: Annotated[bool, typer.Option(help="Of a step of row-wise Adagrad, fused.")] = False,
    frozen: Annotated[bool, typer.Option(help="Of tables in tiers, which have no masks.")] = False,
    huge_pages: Annotated[bool, typer.Option(help="Tables on huge pages.")] = False,
) -> None:
    """Where forward and backward spend their time: sort, sum, mask gradient, fresh memory."""
    if ids not in ("uniform", "zipf") or clock not in ("wall", "cpu"):
        raise typer.BadParameter("ids are uniform or zipf, the clock is wall or cpu")
    if clock == "cpu" and threads > 1:
        raise typer.BadParameter(_ONE_THREAD)
    kind = {"work": "step", "optimizer": "rowwise_adagrad"} if step else {}
    case = backward(rows, distribution=ids, threads=threads)
    case = dataclasses.replace(case, huge_pages=huge_pages, **kind)
    typer.echo(breakdown.run(case, seconds, clock, frozen))


@app.command()
def compare(
    old: Path,
    new: Path,
    tolerance: Annotated[float, typer.Option(help="Relative change that does not matter.")] = 0.05,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.99,
) -> None:
    """Flags what became slower, by interval; exits with 1 where something did."""
    try:
        outcome = compare_reports(
            _read(old), _read(new), tolerance=tolerance, confidence=confidence
        )
    except ResultFormatError as error:
        raise typer.BadParameter(str(error)) from error
    table = Table(box=None)
    for heading in ("case", "contender", "new / old", "interval", "relative to", ""):
        table.add_column(heading, overflow="fold")
    for change in outcome.changes:
        colour = {"slower": "red", "faster": "green", "same": None}[change.verdict]
        table.add_row(
            change.case,
            change.contender,
            f"{change.change.value:.3f}",
            f"{change.change.low:.3f}–{change.change.high:.3f}",
            change.relative_to or "itself",
            change.verdict if change.verdict != "same" else "",
            style=colour,
        )
    console.print(table)
    for name in outcome.missing:
        console.print(f"[yellow]not compared: {name}[/yellow]")
    for name in outcome.added:
        console.print(f"[dim]new: {name}[/dim]")
    if outcome.regressions:
        console.print(f"[red]{len(outcome.regressions)} regression(s)[/red]")
        raise typer.Exit(1)


@app.command()
def summary(
    result: Path,
    out: Annotated[Path | None, typer.Option(help="Write here and not in its place.")] = None,
) -> None:
    """Drops raw samples; medians, percentiles and ratios with their intervals stay."""
    _read(result).summarised().write(out or result)


@app.command()
def table(
    result: Path,
    readme: Annotated[
        Path | None, typer.Option(help="Rewrite the part of this file between its markers.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the whole table here.")] = None,
) -> None:
    """Prints a result file as Markdown, or puts its short form into a README."""
    report = _read(result)
    if readme is not None:
        if not tables.update_readme(readme, tables.readme_section(report, result.as_posix())):
            raise typer.BadParameter(f"{readme} has no markers {tables.README_BEGIN}")
        console.print(f"{readme} updated")
        return
    text = tables.render(report)
    if out is not None:
        write_aside(out, text)
        console.print(f"{out}")
        return
    typer.echo(text)


@app.command()
def plot(
    result: Path,
    out: Annotated[Path | None, typer.Option(help="Folder; by default beside the file.")] = None,
) -> None:
    """Draws ratio bars, a roofline and the scale of cost."""
    for path in plots.draw(_read(result), out or result.parent, result.stem):
        console.print(f"{path}")
