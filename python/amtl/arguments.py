"""Kinds of options and arguments of the command line, each with what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer

_MOST = 2**31 - 1
_SEEDS = 2**32 - 1


def count(help: str, default: object = None) -> Any:
    """An option for a number of things; `default` is what holds if it is not given."""
    return typer.Option(help=help, min=1, max=_MOST, show_default=_shown(default))


def rate(help: str, default: object = None) -> Any:
    """An option for a finite number."""
    return typer.Option(help=help, callback=_finite, show_default=_shown(default))


def seed(help: str) -> Any:
    """An option for the seed of a generator."""
    return typer.Option(help=help, min=0, max=_SEEDS)


def path(help: str, *names: str, default: object = None) -> Any:
    """An option for a file or folder; `names` are those that the parameter's own does not give."""
    return typer.Option(*names, help=help, parser=_path, show_default=_shown(default))


def paths(metavar: str, help: str) -> Any:
    """An argument for a file or folder, or for several."""
    return typer.Argument(metavar=metavar, help=help, parser=_path)


def not_empty(value: str | None) -> str | None:
    """A callback: what is given is not the empty text."""
    if value == "":
        raise typer.BadParameter("it is empty: leave it out, or write a name")
    return value


def _path(text: str | Path) -> Path:
    # Path("") is the working folder, which nobody who types '' means.
    if not str(text).strip():
        raise typer.BadParameter(f"a name is needed, not {str(text)!r}; the working folder is '.'")
    return Path(text)


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("a finite number is needed")
    return value


def _shown(default: object) -> Any:
    return True if default is None else str(default)
