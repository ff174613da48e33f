"""What a person sees while a model trains."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_WHOLE = Column(no_wrap=True, justify="right")
"""Of a terminal too narrow for all, the title gives way."""

_QUIET = 60.0
"""Seconds after which a log, too, says how far it is."""


_UNTOLD = 2.0
"""Seconds up to which a log says nothing of what a person waits for."""


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Shows what is being done while nothing else does: on a terminal until it is over."""
    if console.is_terminal:
        with console.status(escape(what), spinner="line"):
            yield
        return
    told = {"style": "dim", "highlight": False, "soft_wrap": True}
    timer = Timer(_UNTOLD, console.print, [f"  {escape(what)} ..."], told)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Observer(Protocol):
    """Is told how training goes."""

    def begin(self, title: str, steps: int, done_steps: int) -> None:
        """Training of at most `steps` steps starts, or goes on after `done_steps`."""

    def step(self, epochs: float, loss: float, samples: int, steps: int) -> None:
        """So many steps, of so many samples, were taken: `epochs` epochs from the start."""

    def validation(self, record: dict[str, Any]) -> None:
        """The model was validated; `record` is its entry of the history."""

    def score(self, record: dict[str, Any]) -> None:
        """A model that the run is held against was validated; `record` as in `validation`."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""

    def end(self) -> None:
        """Training ended."""


class Silent:
    """Shows nothing."""

    def begin(self, title: str, steps: int, done_steps: int) -> None:
        """Ignored."""

    def step(self, epochs: float, loss: float, samples: int, steps: int) -> None:
        """Ignored."""

    def validation(self, record: dict[str, Any]) -> None:
        """Ignored."""

    def score(self, record: dict[str, Any]) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

    def end(self) -> None:
        """Ignored."""


class Bars:
    """A progress bar with epochs, rate, time left and validation AUC.

    On a terminal one live bar per run; elsewhere a line per run, per validation of the run, and
    whenever a minute has passed without one. Early stopping usually ends training long before its
    last step, so the time left is an upper bound.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._samples = 0
        self._busy = 0.0
        self._last = self._told = 0.0
        self._val = "–"

    def begin(self, title: str, steps: int, done_steps: int) -> None:
        """Opens the bar, in place of the last one."""
        self.end()
        self._title = title
        self._val = "–"
        self._samples, self._busy = 0, 0.0
        self._last = self._told = time.perf_counter()
        self._steps, self._left = 0, steps - done_steps
        if not self._console.is_terminal:
            self._console.print(f"  {title} ...", style="dim", highlight=False, soft_wrap=True)
            return
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True, ratio=1)),
            TextColumn("epoch {task.fields[epoch]:.1f}", table_column=_WHOLE),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[rate]}", table_column=_WHOLE),
            TextColumn("≤", table_column=_WHOLE),
            TimeRemainingColumn(compact=True, table_column=_WHOLE),
            TextColumn("AUC {task.fields[val]}", table_column=_WHOLE),
            console=self._console,
            transient=True,
            expand=True,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task(
            escape(title), total=steps, completed=done_steps, epoch=0.0, rate="", val="–"
        )
        self._progress.start()

    def step(self, epochs: float, loss: float, samples: int, steps: int) -> None:
        """Advances the bar."""
        now = time.perf_counter()
        self._busy += now - self._last
        self._last = now
        self._samples += samples
        self._steps += steps
        rate = self._samples / max(self._busy, 1e-9)
        if self._progress:
            self._progress.update(
                self._task,
                advance=steps,
                epoch=epochs,
                rate=f"{rate / 1e3:.0f}k rows/s",
                val=self._val,
            )
        elif now - self._told > _QUIET:
            self._told = now
            left = self._busy / self._steps * max(self._left - self._steps, 0)
            self._console.print(
                f"  {self._title}  step {self._steps:,} of {self._left:,}, "
                f"{rate / 1e3:.0f}k rows/s, at most {math.ceil(left / 60)} min left, "
                f"val AUC {self._val}",
                style="dim",
                highlight=False,
                soft_wrap=True,
            )

    def validation(self, record: dict[str, Any]) -> None:
        """Shows AUC and log loss."""
        self.score(record)
        loss = "–     " if record["loss"] is None else f"{record['loss']:.4f}"
        line = (
            f"  {self._title}  epoch {record['epoch']:>5.2f}  loss {loss}  "
            f"val AUC {record['val_auc']:.4f}  log loss {record['val_logloss']:.4f}"
            f"{' *' if record['best'] else '  '} {record['phase']}"
        )
        self._console.print(line, style="dim", highlight=False, soft_wrap=True)
        self._told = self._last

    def score(self, record: dict[str, Any]) -> None:
        """Shows the AUC in the bar."""
        self._val = f"{record['val_auc']:.4f}"
        self._last = time.perf_counter()

    def note(self, text: str) -> None:
        """Prints above the bar."""
        self._console.print(f"  {escape(text)}", style="dim", highlight=False)

    def end(self) -> None:
        """Closes the bar."""
        if self._progress:
            self._progress.stop()
            self._progress = None
