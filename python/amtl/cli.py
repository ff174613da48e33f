"""The command line: the commands of `amtl`, a function each."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amtl import arguments, failures, settings
from amtl.arguments import count, rate
from amtl.errors import UserError, listed
from amtl.peers import PEERS
from amtl.run.config import TrainConfig, parse_budget, parse_names

app = typer.Typer(
    name="amtl",
    help="Embedding tables whose rows learn their own width, end to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(emoji=False)

Run = Annotated[Path, arguments.paths("RUN|PACKED", "Run folder or packed file.")]


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Parquet, Arrow, CSV, TSV, JSON, libsvm, libfm or Excel file, or a named set "
            "(see: amtl datasets).",
            callback=arguments.not_empty,
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Label column, 0 and 1.", callback=arguments.not_empty)
    ] = None,
    label_threshold: Annotated[
        float | None, rate("Labels of at least this are positive, others negative.")
    ] = None,
    label_positive: Annotated[
        str | None, typer.Option(help="Labels of this value are positive, others negative.")
    ] = None,
    label_missing: Annotated[
        str | None, typer.Option(help="drop rows without a label, or negative for what they are.")
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            help="Column of what each row counts, 0 or more, in training and in scores.",
            show_default="all alike",
            callback=arguments.not_empty,
        ),
    ] = None,
    negatives: Annotated[
        str | None,
        typer.Option(
            help="USER:ITEM:N for a file of positive rows only: N (1) rows a row of other items."
        ),
    ] = None,
    fields: Annotated[
        str | None, typer.Option(help="Columns to use, separated by commas; default: all.")
    ] = None,
    drop: Annotated[
        str | None, typer.Option(help="Columns not to use, separated by commas.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="amtl, rule, fixed; twins, aml (learn sizes); or a method of the field to compare "
            f"with: {', '.join(PEERS)}."
        ),
    ] = "amtl",
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a setting of such a method.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="dnn, deepfm, dcn, xdeepfm, autoint, din or widedeep.",
            show_default=TrainConfig.backbone,
        ),
    ] = None,
    dim: Annotated[int | None, count("Full embedding width.", TrainConfig.dim)] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Stored share of the bytes of rows × dim, such as 0.1 or 10%, or bytes such as "
            "500kB or 2MB.",
            show_default=str(TrainConfig.budget),
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Of a stored number: 32, 16, 8, 4, 2, or auto for what validation prefers.",
            show_default=TrainConfig.bits,
        ),
    ] = None,
    masters: Annotated[
        bool,
        typer.Option(
            "--masters/--no-masters",
            help="Keep the numbers that training rounds, or train codes alone: needs --bits 16, 8, "
            "4 or 2; the optimizer is row-wise Adagrad or sgd.",
        ),
    ] = True,
    warm_start: Annotated[
        Path | None,
        arguments.path("Go on from this run, with its fields and settings, on newer rows."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="random, order:COLUMN, or column:COLUMN of train/valid/test.")
    ] = "random",
    split_seed: Annotated[int, arguments.seed("Of the random split.")] = 0,
    seed: Annotated[int, arguments.seed("Of weights, batches and size noise.")] = 0,
    numeric: Annotated[
        list[str] | None,
        typer.Option(
            help="bucket or standardise for all numbers (of integers those that look like "
            "amounts, not ids), or COLUMN=bucket,… (also categorical)."
        ),
    ] = None,
    values: Annotated[
        bool, typer.Option(help="Numbers join their embeddings; whole ones of over 10 values too.")
    ] = True,
    multi: Annotated[
        list[str] | None,
        typer.Option(
            help="COLUMN[=SEPARATOR] holds several values; COLUMN= holds one even if it has bars. "
            "COLUMN=SEPARATOR,COLUMN=SEPARATOR names several."
        ),
    ] = None,
    min_count: Annotated[int, count("Rarer values share one row.")] = 1,
    epochs: Annotated[int | None, count("At most.", TrainConfig.epochs)] = None,
    patience: Annotated[
        int | None,
        count("Validations without a better one before it slows down.", TrainConfig.patience),
    ] = None,
    batch_size: Annotated[int | None, count("Samples a step.", "by the data's size")] = None,
    lr: Annotated[float | None, rate("Of all but the table.", TrainConfig.lr)] = None,
    table_lr: Annotated[float | None, rate("Of the table.", "by its optimizer")] = None,
    table_optimizer: Annotated[
        str | None,
        typer.Option(
            help="adam, adagrad, rowwise_adagrad or sgd.",
            show_default="adagrad",
        ),
    ] = None,
    embedding_dropout: Annotated[
        float | None,
        rate("Share of the embeddings' numbers zeroed in a step.", "by validation"),
    ] = None,
    embedding_decay: Annotated[
        float | None,
        rate("Weight decay of all embeddings, looked up or not.", "by validation, or 1e-4"),
    ] = None,
    hide_unseen: Annotated[
        bool | None,
        typer.Option(
            "--hide-unseen/--no-hide-unseen",
            help="Take values as unseen in training as often as validation has unseen ones.",
            show_default="by validation",
        ),
    ] = None,
    distillation: Annotated[
        float | None,
        rate("Share of each label that a better model's prediction replaces.", "by validation"),
    ] = None,
    freeze_at: Annotated[
        int | None, count("Step at which sizes are fixed.", "by validation")
    ] = None,
    exponent: Annotated[
        float | None, rate("a of size ∝ (count + 1)^a in place of the capacity rule.")
    ] = None,
    capacity_bits: Annotated[
        float | None,
        rate("Bits a number is worth: many make sizes flat, few steep.", "by validation"),
    ] = None,
    parametrization: Annotated[
        str | None,
        typer.Option(
            help="amtl: rule (by counts and fields), ordinal (twins learn one number a group), "
            "free (the paper's logits), paper (and no budget).",
            show_default="rule",
        ),
    ] = None,
    race: Annotated[
        bool, typer.Option(help="Try on validation how sizes should follow from counts.")
    ] = True,
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="Training time, such as 10m, after which the best so far is the result; what "
            "--compare trains comes on top."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        count("Trainings side by side, in processes of one part of the threads each.", "by cores"),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(help="Train a full-size and a same-bytes fixed table too, to compare."),
    ] = False,
    out: Annotated[Path | None, arguments.path("Run folder.", default="runs/…")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each column would be taken as, and stop.")
    ] = False,
) -> None:
    """Train a model on a file or a named data set.

    Reads, splits 80/10/10, trains with early stopping on validation AUC, scores the test split
    once, and leaves a run folder with checkpoints and metrics.json.
    """
    from amtl.data import label_note, load_source
    from amtl.data.splits import split_note
    from amtl.run.display import print_plan
    from amtl.run.folders import holds_run, load_earlier, require_begun
    from amtl.run.preparation import prepare
    from amtl.run.progress import waiting
    from amtl.run.training import Trainer, start

    seconds = settings.parse_seconds("--time-limit", time_limit)
    if resume:
        if dry_run:
            raise UserError(
                "--resume goes on training, and --dry-run trains nothing: leave one out"
            )
        if out is None:
            raise UserError("--resume needs --out DIR, the folder of the run to go on with")
        require_begun(out)
        console.print(f"[bold]resuming[/] {escape(str(out))} with its own settings")

        def go_on(stop: Any, bars: Any) -> Any:
            more = {"observer": bars, "stop": stop, "time_limit": seconds, "jobs": jobs}
            with waiting(console, "reading its data"):
                trainer = start(None, out, resume=True, **more)
            rows = trainer.task.encoder.num_rows
            other = settings.not_applied(_typed(context), trainer.asked, rows)
            if other:
                console.print(
                    f"  not applied, since the run has other values: {', '.join(other)} (--force "
                    "in place of --resume starts anew with them)",
                    style="yellow",
                    highlight=False,
                )
            return trainer

        _train(go_on, out)
        return
    if data is None:
        raise UserError("name the data: a Parquet or CSV file, or a set (see: amtl datasets)")
    given = {
        "backbone": backbone,
        "dim": dim,
        **({} if budget is None else parse_budget(budget)),
        "bits": bits,
        "epochs": epochs,
        "patience": patience,
        "batch_size": batch_size,
        "lr": lr,
        "table_lr": table_lr,
        "table_optimizer": table_optimizer,
        "embedding_dropout": embedding_dropout,
        "embedding_decay": embedding_decay,
        "distillation": distillation,
        "hides": hide_unseen,
        "freeze_at": freeze_at,
    }
    given = {name: value for name, value in given.items() if value is not None}
    laws = {"exponent": exponent, "capacity_bits": capacity_bits}
    laws = {name: value for name, value in laws.items() if value is not None}
    settings.refuse_idle(
        method, parametrization, [*given, *laws, *([] if budget is None else ["budget"])]
    )
    earlier = load_earlier(warm_start) if warm_start else None
    if earlier is not None:
        negatives = negatives or earlier.config.negatives
    with waiting(console, f"reading {data}"):
        source = load_source(data, negatives)
    columns = source.frame.columns
    config = settings.make_config(
        source,
        given,
        earlier.config if earlier else None,
        _typed(context),
        label=label,
        label_threshold=label_threshold,
        label_positive=label_positive,
        label_missing=label_missing,
        weight=weight,
        negatives=negatives,
        fields=parse_names("--fields", fields, columns),
        drop=parse_names("--drop", drop, columns),
        method=method,
        warm_start=str(warm_start) if warm_start else None,
        split=split,
        split_seed=split_seed,
        seed=seed,
        min_count=min_count,
        values=values,
        race=race,
        compare=compare,
        masters=masters,
        laws=laws,
        parametrization=parametrization,
        options=settings.parse_options(method, option or []),
        **settings.parse_columns(numeric or [], multi or [], columns),
    )
    if earlier is not None:
        config = earlier.continued(config, source)
    if out is None:
        stem = "-".join(Path(part).stem for part in source.name.split(":"))
        stem += f"-{backbone}" if backbone else ""
        share = "" if config.effective_budget is None else f"-b{config.effective_budget:g}"
        if config.budget_bytes is not None:
            share = f"-b{config.budget_bytes}B"
        share += f"-{config.bits}bits" if config.bits != TrainConfig.bits else ""
        share += "" if config.masters else "-nomasters"
        out = Path("runs") / f"{stem}-{method}-d{config.dim}{share}-s{seed}"
    if holds_run(out) and not (force or dry_run):
        at = shlex.quote(str(out))
        raise UserError(
            f"{out} holds a run already: --resume --out {at} goes on with it, --force replaces it"
        )
    note = label_note(source.frame, *config.labelling)
    if source.licence:
        console.print(f"[dim]{escape(source.licence)}[/]", highlight=False)
    console.print(
        f"[bold]{escape(source.name)}[/]: {source.frame.height:,} rows, label "
        f"{escape(config.label)}{escape(f' ({note})' if note else '')}",
        highlight=False,
    )
    for line in filter(
        None, [*source.notes, split_note(source.frame, config.split, config.fields)]
    ):
        console.print(f"  {escape(line)}", highlight=False)
    with waiting(console, f"looking at {len(columns):,} columns"):
        task, folder = prepare(config, source, earlier=earlier), out
    # Training needs the memory of the raw table.
    del source

    def begin(stop: Any, bars: Any) -> Any:
        return Trainer(config, task, folder, bars, stop, seconds, jobs)

    if dry_run:
        print_plan(console, Trainer(config, task))
        return
    _train(begin, folder, fresh=True)


def _typed(context: typer.Context) -> dict[str, Any]:
    """What the command line gave, by parameter: no defaults."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def _train(make: Any, out: Path, fresh: bool = False) -> dict[str, Any]:
    """Runs a trainer under progress bars and Ctrl-C handling; prints its result.

    What was guessed of the columns is told of a `fresh` run.
    """
    from amtl.run.display import print_decisions, print_result
    from amtl.run.done import Interrupted
    from amtl.run.progress import Bars

    stop = failures.Stopper(console)
    trainer = make(stop, Bars(console))
    if fresh:
        print_decisions(console, trainer.task.encoder.decisions, trainer.task.notes)
    with stop:
        try:
            metrics: dict[str, Any] = trainer.run()
        except Interrupted as stopped:
            command = f"amtl train --resume --out {shlex.quote(str(out))}"
            console.print(
                f"stopped; {escape(stopped.kept)} is in {escape(str(out))}. Go on with: "
                f"[bold]{escape(command)}[/]"
            )
            sys.exit(failures.STOPPED)
    print_result(console, metrics, out)
    return metrics


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Labelled file; default: the run's own test split.", callback=arguments.not_empty
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="DATA's label column.", show_default="as trained", callback=arguments.not_empty
        ),
    ] = None,
    label_threshold: Annotated[
        float | None, rate("Labels of at least this are positive.", "as trained")
    ] = None,
    label_positive: Annotated[
        str | None,
        typer.Option(help="Labels of this value are positive.", show_default="as trained"),
    ] = None,
    label_missing: Annotated[
        str | None, typer.Option(help="drop or negative, see train.", show_default="as trained")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Also the AUC within each value of this column, as the user.",
            show_default="none",
            callback=arguments.not_empty,
        ),
    ] = None,
) -> None:
    """Score a trained or packed model: AUC and log loss."""
    from amtl.run import scoring
    from amtl.run.display import shown_auc, shown_within
    from amtl.run.folders import load_trained
    from amtl.run.progress import waiting

    trained = load_trained(run)
    labelling = label, label_threshold, label_positive, label_missing
    if data is None and any(v is not None for v in labelling):
        raise UserError("--label and its kin are about DATA: name the file to score")
    what = f"test split of {trained.config.data}" if data is None else data
    with waiting(console, f"reading {data or trained.config.data}"):
        if data is None:
            rows = scoring.of_test_split(trained, by)
        else:
            rows = scoring.of_file(trained, data, labelling, by)
    with waiting(console, "scoring"):
        result = trained.evaluate(rows.encoded, rows.groups)
    unused = trained.encoder.unused()
    unknown = {k: v for k, v in result["unknown_values"].items() if v and k not in unused}
    of = "" if rows.encoded.weights is None else f", weighted by {trained.config.weight!r}"
    count = f"{len(rows.encoded):,} rows"
    console.print(f"[bold]{escape(what)}[/]: {count}{escape(of)}", highlight=False)
    area = shown_auc(result["auc"], result["auc_error"], result["rows"], result["positive"])
    console.print(
        f"AUC {area}   log loss {result['logloss']:.4f}   positive {result['positive_rate']:.1%}",
        highlight=False,
    )
    if by is not None:
        console.print(escape(shown_within(by, result)), highlight=False)
    if unknown:
        rowless = listed([f"{k} {v:,}" for k, v in unknown.items()])
        text = f"values without a row of their own: {escape(rowless)}"
        console.print(text, style="dim", highlight=False)
    if unused:
        text = f"not used by this model: {escape(listed(unused))}"
        console.print(text, style="dim", highlight=False)
    for sentence in rows.strange:
        console.print(escape(sentence), style="yellow", highlight=False)


@app.command()
def predict(
    run: Run,
    data: Annotated[
        str, typer.Argument(help="File of rows, labelled or not.", callback=arguments.not_empty)
    ],
    out: Annotated[Path, arguments.path("File to write: .parquet, .csv or .tsv.", "--out", "-o")],
    columns: Annotated[
        str | None,
        typer.Option(
            help="DATA's columns to write beside it, separated by commas, such as an id.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Write the probability of a click for each row of a file, in its order."""
    import polars as pl

    from amtl.data import load_rows, require_columns, require_kind, require_other, write_rows
    from amtl.run.folders import load_trained
    from amtl.run.progress import waiting

    require_kind(out)
    require_other(out, data)
    trained = load_trained(run)
    with waiting(console, f"reading {data}"):
        frame, told = load_rows(data, trained.encoder.optional())
    names = parse_names("--columns", columns, frame.columns)
    require_columns(frame.columns, names, data)
    if "probability" in names:
        raise UserError("--columns probability: predictions have that name; rename the column")
    with warnings.catch_warnings(record=True) as strange, waiting(console, "scoring"):
        warnings.simplefilter("always", UserWarning)
        found = trained.probabilities(frame)
    write_rows(pl.DataFrame([*frame.select(names), pl.Series("probability", found.numpy())]), out)
    mean = f", {float(found.mean()):.4f} in the mean" if len(found) else ""
    many = f"{len(found):,} probabilit{'y' if len(found) == 1 else 'ies'}"
    text = f"wrote [bold]{escape(str(out))}[/], {many}{mean}"
    console.print(text, highlight=False)
    for sentence in (*told, *(str(warning.message) for warning in strange)):
        console.print(escape(sentence), style="yellow", highlight=False)


@app.command()
def pack(
    run: Annotated[Path, arguments.paths("RUN", "Run folder.")],
    out: Annotated[Path, arguments.path("File to write, .safetensors.", "--out", "-o")],
    dtype: Annotated[
        str, typer.Option(help="Of the embeddings: float32 (same predictions) or float16.")
    ] = "float32",
    bits: Annotated[
        int | None,
        typer.Option(
            help="Round the embeddings to 16, 8, 4 or 2 bits; amtl evaluate FILE scores it."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Share of the bytes of a full table, or bytes as 2MB, that the principal "
            "components of a table of 32 bits may take, without more training; amtl evaluate FILE "
            "scores it."
        ),
    ] = None,
) -> None:
    """Write a trained model to one file: tiers, MLP, vocabularies. No pickle."""
    import torch

    from amtl.run.folders import mlp_bytes, pack_run
    from amtl.run.methods import dense_bytes, stored_bytes

    types = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in types:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(types)}")
    if bits not in (None, 16, 8, 4, 2):
        raise UserError(f"--bits {bits}: choose one of 16, 8, 4, 2")
    given = f"--bits {bits}" if bits is not None else f"--budget {budget}"
    if (bits, budget) != (None, None) and types[dtype] is not None:
        raise UserError(f"{given} and --dtype {dtype} exclude each other: leave one out")
    packed = pack_run(run, out, types[dtype], bits, budget)
    stored, full = stored_bytes(packed.model.table), dense_bytes(packed.model.table)
    mlp, total = mlp_bytes(packed.model), out.stat().st_size
    console.print(
        f"wrote [bold]{escape(str(out))}[/], {total:,} bytes: embeddings {stored:,} "
        f"({stored / full:.1%} of a full {dtype} table), MLP {mlp:,}, vocabularies and header "
        f"{total - stored - mlp:,}",
        highlight=False,
    )


@app.command()
def inspect(run: Run) -> None:
    """Show sizes per field and their histogram."""
    from amtl.run.display import print_sizes
    from amtl.run.folders import load_trained

    print_sizes(console, str(run), load_trained(run))


@app.command()
def report(
    runs: Annotated[list[Path], arguments.paths("RUN…", "Finished run folders.")],
    out: Annotated[Path, arguments.path("File to write.", "--out", "-o")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML file with results, curves and sizes of runs."""
    from amtl.run.display import print_results
    from amtl.run.report import group_results, load_metrics, write_report

    write_report(runs, out)
    print_results(console, group_results(load_metrics(runs)))
    console.print(f"wrote [bold]{escape(str(out))}[/]", highlight=False)


@app.command()
def compare(
    runs: Annotated[list[Path], arguments.paths("RUN…", "Finished run folders.")],
) -> None:
    """Print the results of runs on one data set side by side, seeds averaged."""
    from amtl.run.display import print_results
    from amtl.run.report import group_results, load_comparable

    print_results(console, group_results(load_comparable(runs, "compare")))


@app.command()
def datasets() -> None:
    """List the data sets known by name."""
    from amtl.data.registry import named_sets

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("name", "what", "licence"):
        table.add_column(name)
    for name, known in named_sets().items():
        table.add_row(f"[bold]{name}[/]", known.about, known.licence)
    console.print(table)


@app.command()
def demo(
    out: Annotated[Path, arguments.path("Folder for runs, report and model.")] = Path("runs/demo"),
    data: Annotated[
        str, typer.Option(help="Named set or file.", callback=arguments.not_empty)
    ] = "nycflights13",
    epochs: Annotated[int | None, count("At most.", TrainConfig.epochs)] = None,
    seed: Annotated[int, arguments.seed("Of every run.")] = 0,
) -> None:
    """Flights out of New York: full-size, fixed, rule and learned sizes side by side."""
    from amtl.run.demo import run_demo

    run_demo(console, out, data, epochs, seed)


@app.command()
def paper(
    sets: Annotated[
        str,
        typer.Option(
            help="Names separated by commas: nycflights13, easy, medium, hard. NAME@COLUMN trains "
            "on the first 80 % in the order of that column and tests on the last 10 %."
        ),
    ] = "nycflights13,easy,medium,hard,nycflights13@date",
    also: Annotated[
        list[str] | None, typer.Option(help="NAME=DATA:TARGET:FIELDS, a set of yours too.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Percent of the bytes of full size, separated by commas.")
    ] = "12.5,3,40,1,6.25,0.5,25,0.1,100",
    methods: Annotated[
        str | None, typer.Option(help="Separated by commas.", show_default="all")
    ] = None,
    add: Annotated[
        list[Path] | None, arguments.path("Python file with a method of yours, to score too.")
    ] = None,
    trials: Annotated[int, count("Settings tried for each configuration.")] = 8,
    seeds: Annotated[int, count("Fresh seeds of each configuration.")] = 3,
    finalist_seeds: Annotated[
        int | None, count("Of the best three, amtl and fixed.", "two more than --seeds")
    ] = None,
    epochs: Annotated[int | None, count("At most.", TrainConfig.epochs)] = None,
    backbones: Annotated[
        str,
        typer.Option(
            help="Click models that the best three are run with too, at the end; empty for none."
        ),
    ] = "deepfm,dcn,autoint",
    jobs: Annotated[int, count("Processes, one thread each.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A slice of a few minutes that shows how it works.")
    ] = False,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Write the page from the runs that there are.")
    ] = False,
    summary: Annotated[
        Path | None, arguments.path("Write the page of this summary, and run nothing.")
    ] = None,
    out: Annotated[Path, arguments.path("Folder for runs, summary and page.")] = Path("runs/paper"),
) -> None:
    """Compare methods at equal bytes: tune, train with fresh seeds, write one page.

    Can be stopped at any time, and started again to go on; several at once, with the same --out,
    share the work.
    """
    from amtl.paper.command import make_plan, run_paper, write_pages

    if summary is not None:
        write_pages(console, summary, out)
        return
    added = add or []
    plan = make_plan(
        *(sets, also or [], budgets, methods, added, trials, seeds, finalist_seeds, epochs),
        *(backbones, quick),
    )
    run_paper(console, plan, out, added, jobs, page_only)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point; see `failures.run` for what it tells when something is wrong."""
    sys.exit(failures.run(app, sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    main()
