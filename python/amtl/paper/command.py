"""`amtl paper`: runs, progress, and the page at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from amtl.errors import UserError
from amtl.paper.page import write_html, write_markdown
from amtl.paper.protocol import QUICK_SETS, Plan, choose_sets, contenders
from amtl.paper.records import read
from amtl.paper.summary import VERSION, summarise
from amtl.paper.work import Records, count, of_now, run_plan
from amtl.peers import add_peer
from amtl.run.config import parse_names
from amtl.run.training import versions
from amtl.store.files import read_json, write_json, write_text

RUNS, SUMMARY, PAGE, TEXT = "runs.jsonl", "summary.json", "paper.html", "paper.md"


def make_plan(
    sets: str,
    also: Sequence[str],
    budgets: str,
    methods: str | None,
    added: Sequence[Path],
    trials: int,
    seeds: int,
    finalist_seeds: int | None,
    epochs: int | None,
    backbones: str = "",
    quick: bool = False,
) -> Plan:
    """The plan of a command line; the methods of files are added to it and to `PEERS`.

    Args:
        sets: names, separated by commas.
        also: sets as `NAME=DATA:LABEL:FIELDS`.
        budgets: in percent, separated by commas.
        methods: names, separated by commas; None for all.
        added: files of methods.
        trials: see `Plan`.
        seeds: see `Plan`.
        epochs: see `Plan`.
        finalist_seeds: see `Plan`; None for two more than `seeds`.
        backbones: names, separated by commas; empty for none.
        quick: a slice of a few minutes in place of sets, budgets, trials and seeds.

    Raises:
        UserError: something is not known, or not a number.
    """
    own = [add_peer(path) for path in added]
    if quick:
        sets, budgets, backbones = ",".join(QUICK_SETS), "12.5,3", ""
        trials, seeds, finalist_seeds, epochs = 2, 1, 1, epochs or 4
    percents = parse_names("--budgets", budgets)
    try:
        shares = [float(percent) / 100 for percent in percents]
    except ValueError:
        raise UserError(f"--budgets {budgets}: write percents separated by commas") from None
    names = parse_names("--methods", methods) or [*contenders()]
    return Plan(
        choose_sets(sets, also),
        shares,
        list(dict.fromkeys([*names, *own])),
        trials,
        seeds,
        finalist_seeds or seeds + 2,
        epochs,
        parse_names("--backbones", backbones or None),
    )


def run_paper(
    console: Console,
    plan: Plan,
    folder: Path,
    added: Sequence[Path] = (),
    workers: int = 1,
    page_only: bool = False,
) -> None:
    """Makes the runs that are missing, and writes the summary and the page.

    Args:
        console: where progress is shown.
        plan: what to run.
        folder: for `runs.jsonl`, `summary.json`, `paper.html` and `paper.md`.
        added: files of methods to add.
        workers: processes.
        page_only: makes no runs.
    """
    out = folder / RUNS
    if not page_only:
        _run(console, plan, out, added, workers)
    write_json(folder / SUMMARY, summarise(of_now(read(out)), plan, versions()))
    console.print(f"wrote [bold]{escape(str(folder / SUMMARY))}[/]", highlight=False)
    write_pages(console, folder / SUMMARY, folder)


def write_pages(console: Console, path: Path, folder: Path) -> None:
    """Writes the page of a summary, as HTML and as Markdown.

    Raises:
        UserError: it is no summary, or of a newer version.
    """
    summary = read_json(path)
    if summary.get("version") != VERSION:
        raise UserError(f"{path} is no summary of amtl paper, or of another version")
    for name, text in ((PAGE, write_html(summary)), (TEXT, write_markdown(summary))):
        write_text(folder / name, text)
        console.print(f"wrote [bold]{escape(str(folder / name))}[/]", highlight=False)


def _run(console: Console, plan: Plan, out: Path, added: Sequence[Path], workers: int) -> None:
    known = list(read(out))
    total, before = count(plan), len(of_now(known))
    started = time.monotonic()
    told = before
    self_tuned = [name for name in plan.methods if contenders()[name].tunes_itself]
    console.print(
        f"at most {total:,} runs, {before:,} made; {escape(', '.join(self_tuned)) or 'none'} "
        f"tune themselves and take longer. Stop at any time: the same command goes on.",
        highlight=False,
    )
    if len(known) > before:
        console.print(
            f"{len(known) - before:,} runs are of methods whose file was another one: made again",
            style="yellow",
            highlight=False,
        )
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("runs", total=total, completed=before, left="")

        def tell(records: Records) -> None:
            nonlocal told
            for record in records[told:]:
                console.print(_line(record), style="dim", highlight=False)
            told = max(told, len(records))
            made = told - before
            left = ""
            if made:
                seconds = (time.monotonic() - started) / made * max(0, total - told)
                left = f"at most {seconds / 3600:.1f} h left"
            progress.update(task, completed=told, left=left)

        run_plan(plan, out, added, workers, tell)


def _line(record: dict[str, Any]) -> str:
    job = record["job"]
    what = f"trial {job['trial']}" if "trial" in job else f"seed {job['seed']}"
    name = f"  {job['set']} ≤ {100 * job['budget']:g} % {job['method']}, {what}"
    if "refused" in record:
        return f"{name}: {record['refused']}"
    scores = f"val AUC {record['val_auc']:.4f}"
    if "test_auc" in record:
        scores += f", test AUC {record['test_auc']:.4f}"
    size = f"{record['bytes']:,} bytes"
    if record.get("unclaimed"):
        size += f" by parts(), which leaves {record['unclaimed']:,} numbers of the module out"
    return f"{name}: {scores}, {size}, {record['cpu']:.0f} s"
