"""The demonstration behind `make demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from amtl.data.registry import load_source
from amtl.errors import UserError
from amtl.run import methods
from amtl.run.comparison import score_of
from amtl.run.config import TrainConfig
from amtl.run.contenders import DECAYS
from amtl.run.display import print_results
from amtl.run.folders import load_run, load_trained, pack_run
from amtl.run.progress import Bars
from amtl.run.report import baseline, group_results, write_report
from amtl.run.training import start

BUDGETS = (0.03,)
NARROW = 0.125


def run_demo(
    console: Console,
    out: Path,
    data: str = "nycflights13",
    epochs: int | None = None,
    seed: int = 0,
) -> None:
    """Trains fixed and amtl models side by side, packs the best amtl one and checks it.

    The full-size model, without and with weight decay, a narrow one and one of 4 bits a number are
    the yardsticks; the latter two have 12.5 % of the bytes.

    Args:
        console: where to show it.
        out: folder for runs, `report.html` and `model.safetensors`.
        data: a data set with default label and fields.
        epochs: at most so many, or None for the default.
        seed: of every run.

    Raises:
        UserError: if the packed model does not predict what the trained one does.
    """
    began = time.perf_counter()
    source = load_source(data)
    if source.label is None:
        raise UserError(f"the demo needs a named data set, not {data}")
    console.print(
        f"[bold]{escape(source.name)}[/]: {source.frame.height:,} rows, label "
        f"{source.label}   [dim]{escape(source.licence)}[/]",
        highlight=False,
    )
    given = {} if epochs is None else {"epochs": epochs}
    dim = source.settings("fixed").get("dim", TrainConfig.dim)
    narrow = max(1, round(dim * NARROW))
    plan: list[tuple[str, dict[str, Any]]] = [
        ("fixed-full", {"method": "fixed"}),
        ("fixed-full-decay", {"method": "fixed", "embedding_decay": DECAYS[0]}),
        ("fixed-narrow", {"method": "fixed", "dim": narrow}),
        ("fixed-4-bits", {"method": "fixed", "bits": "4"}),
        *((f"amtl-{b:g}", {"method": "amtl", "budget": b}) for b in BUDGETS),
    ]
    folders, all_metrics = [], []
    for name, settings in plan:
        config = TrainConfig(
            data=source.name,
            label=source.label,
            seed=seed,
            **{"dim": dim, **source.settings(settings["method"]), **given, **settings},
        )
        folder = out / name
        trainer = start(config, folder, observer=Bars(console), source=source, jobs=None)
        all_metrics.append(trainer.run())
        folders.append(folder)
    console.print()
    results = group_results(all_metrics)
    print_results(console, results)

    fixed = baseline(results)
    assert fixed is not None
    adaptive = [i for i, m in enumerate(all_metrics) if m["method"] == "amtl"]
    best = max(adaptive, key=lambda i: score_of(all_metrics[i]))
    full, chosen = fixed.runs[0], all_metrics[best]
    packed_path = out / "model.safetensors"
    pack_run(folders[best], packed_path)
    packed = load_trained(packed_path)
    trained = load_run(folders[best])
    frame = source.frame[: min(50_000, source.frame.height)]
    same = torch.equal(packed.probabilities(frame), trained.probabilities(frame))
    if not same:
        raise UserError("the packed model predicts something else: please report this")
    stored = methods.stored_bytes(packed.model.table)
    for line in (
        f"packed model  [bold]{escape(str(packed_path))}[/], {packed_path.stat().st_size:,} bytes "
        "in all",
        f"  embeddings  {stored:,} bytes, one in {full['stored_bytes'] / stored:.0f} of the full "
        f"table's {full['stored_bytes']:,}",
        f"  test AUC    {chosen['test_auc']:.4f}; the best full table has {full['test_auc']:.4f}",
        f"  checked     {frame.height:,} predictions equal the trained model's, bit for bit",
    ):
        console.print(line, highlight=False)
    report = out / "report.html"
    write_report(folders, report)
    console.print(f"report        [bold]{escape(str(report))}[/]", highlight=False)
    console.print(f"took          {time.perf_counter() - began:.0f} s", highlight=False)
