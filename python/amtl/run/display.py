"""Tables of results on a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amtl.data.specs import FieldSpec
from amtl.errors import listed
from amtl.run import comparison, methods
from amtl.run.metrics import one_class
from amtl.run.report import Result, table_rows
from amtl.run.trained import Trained, size_table
from amtl.run.training import Trainer

_ALIKE = 3
"""Columns of which a note says the same, up to which each has its own line."""
_TAKEN_AS = {
    "categorical": "ids",
    "bag": "several values",
    "bucket": "number, buckets",
    "standardise": "number",
    "unused": "left out",
}


def print_decisions(
    console: Console, decisions: Sequence[FieldSpec], notes: Sequence[str] = ()
) -> None:
    """What there is to say about the data, and how columns were taken, where that was guessed."""
    for note in notes:
        console.print(f"  {escape(note)}", highlight=False)
    guessed = [spec for spec in decisions if spec.note]
    if not guessed:
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(style="bold", overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    alike: dict[tuple[str, str], list[FieldSpec]] = {}
    for spec in guessed:
        told = re.sub(rf"(--\w+ '?){re.escape(spec.name)}=", r"\1COLUMN=", spec.note)
        alike.setdefault((_taken_as(spec), told), []).append(spec)
    for (taken, told), specs in alike.items():
        if len(specs) > _ALIKE:
            table.add_row(escape(listed([spec.name for spec in specs])), taken, escape(told))
            continue
        for spec in specs:
            table.add_row(escape(spec.name), taken, escape(spec.note))
    console.print(table)


def _taken_as(spec: FieldSpec) -> str:
    beside = " and number" if spec.value and spec.kind == "categorical" else ""
    return _TAKEN_AS[spec.kind] + beside


def print_plan(console: Console, trainer: Trainer) -> None:
    """What a run would be made of, before anything is trained."""
    task, config = trainer.task, trainer.config
    encoder = task.encoder
    rows = dict(zip(encoder.names, encoder.field_sizes, strict=True))
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column("column", style="bold", overflow="fold")
    table.add_column("taken as", no_wrap=True)
    table.add_column("rows", justify="right")
    for spec in encoder.decisions:
        number = f"{rows[spec.name]:,}" if spec.name in rows else "–"
        table.add_row(escape(spec.name), _taken_as(spec), number)
    console.print(table)
    print_decisions(console, encoder.decisions, task.notes)
    splits = {"training": task.train, "validation": task.val, "test": task.test}
    told = ", ".join(
        f"{name} {len(part):,} ({int((part.labels > 0.5).sum()):,} positive)"
        for name, part in splits.items()
    )
    console.print(f"  {told}", highlight=False)
    whole = 4 * config.dim * encoder.num_rows
    limit = config.effective_budget
    allowed = "" if limit is None else f"; --budget allows {limit * whole:,.0f}"
    console.print(
        f"  the table: {encoder.num_rows:,} rows of {config.dim}, {whole:,} bytes of 32 bits "
        f"a number{allowed}",
        highlight=False,
    )


def shown_auc(auc: float, error: float, rows: int, positive: int) -> str:
    """An AUC with its standard error, if it has one; else what its rows lack."""
    if told := one_class(rows, positive):
        return f"[bold]none[/]: {told}; another --split in training may test on both"
    return f"[bold]{auc:.4f}[/]" + ("" if math.isnan(error) else f" ± {error:.4f} s.e.")


def shown_within(by: str, result: Mapping[str, Any]) -> str:
    """The AUC within groups of rows, and of which these are."""
    if not result["groups"]:
        return f"AUC within {by!r}: none, for no value has rows of both classes"
    return (
        f"AUC within {by!r} {result['grouped_auc']:.4f}, the mean by rows over "
        f"{result['groups']:,} values that have both classes ({result['grouped_rows']:.1%} of the "
        "rows)"
    )


def print_result(console: Console, metrics: dict[str, Any], out: Path) -> None:
    """What a run ends with: its metrics, and how it compares."""
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    steps, tested = metrics["step_ms_median"], metrics["held_out"]["test"]
    weight = metrics.get("weight")
    unused = metrics["unused_fields"]
    rowless = {k: v for k, v in metrics["unknown_test_values"].items() if v and k not in unused}
    unknown = listed([f"{k} {v:,}" for k, v in rowless.items()])
    about = f"about {metrics['packed_bytes']:,} bytes: " if "packed_bytes" in metrics else ""
    rows = {
        "test AUC": f"{shown_auc(metrics['test_auc'], metrics['test_auc_error'], **tested)}  "
        f"(validation {metrics['val_auc']:.4f}, epoch {metrics['best_epoch']:.2f} of "
        f"{metrics['epochs_run']:.2f})",
        "log loss": f"{metrics['test_logloss']:.4f}",
        "weighted": f"by {escape(repr(weight))}, as all scores are" if weight else "",
        "table": f"{metrics['stored_bytes']:,} bytes, {metrics['stored_fraction']:.1%} of "
        f"{metrics['dense_bytes']:,}",
        "chosen": comparison.choices(metrics),
        "without a row": f"{escape(unknown)} test values" if unknown else "no test value",
        "not used": f"by this model: {escape(listed(unused))}" if unused else "",
        "step": " / ".join(f"{v:.1f} ms {k}" for k, v in steps.items() if v is not None),
        "run": escape(str(out)),
        "to serve": f"amtl pack {escape(str(out))} -o FILE: {about}the table, an MLP of "
        f"{metrics['mlp_bytes']:,} bytes, vocabularies of about "
        f"{metrics['vocabulary_bytes']:,}, and a header",
        "smaller": "the same with --budget 0.1, or less, keeps the table's principal components, "
        "without more training"
        if _may_be_cut_off(metrics["config"])
        else "",
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    console.print(table)
    print_comparison(console, metrics)


def _may_be_cut_off(config: Mapping[str, Any]) -> bool:
    """Whether `amtl pack --budget` is for a run of these settings."""
    full = config["method"] == "fixed" and config["bits"] in ("auto", "32")
    return bool(full and config["backbone"] == "dnn")


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Runs side by side, seeds averaged."""
    header, rows = table_rows(results)
    table = _table(header)
    for result, row in zip(results, rows, strict=True):
        table.add_row(*map(escape, row), style="bold" if result.method == "amtl" else "")
    console.print(table)


def print_comparison(console: Console, metrics: dict[str, Any]) -> None:
    """A run beside a table of full size and one of fixed width in the same bytes."""
    header, rows = comparison.table(metrics)
    if len(rows) > 1:
        table = _table(header)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == comparison.THIS else "")
        console.print(table)
    for told in comparison.verdict(metrics):
        console.print(f"  {told}", style="yellow", highlight=False)


def print_sizes(console: Console, title: str, trained: Trained) -> None:
    """Sizes of a trained model by field, and their histogram."""
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left")
    table.add_column("field")
    for name in ("values", "mean size", "by lookups", "sizes", "bytes", "share"):
        table.add_column(name, justify="right")
    entries = size_table(trained)
    stored, full = (f(trained.model.table) for f in (methods.stored_bytes, methods.dense_bytes))
    beside = {field.name: " + number" for field in trained.encoder.valued}
    for e in entries:
        table.add_row(
            escape(e["field"]) + (" (bag)" if e["kind"] == "bag" else beside.get(e["field"], "")),
            f"{e['rows']:,}",
            f"{e['mean_size']:.2f}",
            f"{e['mean_size_of_lookups']:.2f}",
            f"{e['min_size']}–{e['max_size']}",
            f"{e['bytes']:,}",
            f"{e['bytes'] / max(stored, 1):.1%}",
        )
    steps = stored - sum(e["bytes"] for e in entries)
    if steps:
        table.add_row("step sizes", *[""] * 4, f"{steps:,}", f"{steps / stored:.1%}")
    console.print(table)
    widths = methods.row_widths(trained.model.table).numpy()
    sizes, rows = np.unique(widths, return_counts=True)
    top = rows.max()
    console.print("[bold]size  values[/]")
    for size, n in zip(sizes, rows, strict=True):
        bar = ("#" if console.options.ascii_only else "█") * max(1, round(40 * n / top))
        console.print(f"{size:>4}  {n:>9,}  [blue]{bar}[/]", highlight=False)
    bits = methods.number_bits(trained.model.table)
    console.print(
        f"\n{stored:,} of {full:,} bytes ({stored / full:.1%}); method {trained.config.method}, "
        f"width {trained.config.dim}, {bits} bits a number",
        highlight=False,
    )


def _table(header: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for i, name in enumerate(header):
        # In two lines, and names in two where need be, for all numbers to fit into 80 characters.
        title = name.replace(", ", "\n").replace("log loss", "log\nloss")
        table.add_column(title, justify="right" if i else "left", no_wrap=i > 0)
    return table
