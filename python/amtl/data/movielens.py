"""MovieLens 1M and 100K from their official archives.

GroupLens forbids redistribution, so the archive is downloaded from them on first use, checked
against its published MD5 and kept in a cache folder (`AMTL_CACHE`, by default `~/.cache/amtl`).
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import polars as pl

from amtl.errors import UserError
from amtl.store.files import write_aside

LABEL = "label"
FIELDS = ("user_id", "movie_id", "gender", "age", "occupation", "zip", "genres", "year")
POSITIVE_RATING = 4
LICENCE = (
    "MovieLens data, GroupLens Research, University of Minnesota. Research use only; no "
    "redistribution and no commercial use without permission; cite Harper and Konstan, 2015. "
    "https://grouplens.org/datasets/movielens/"
)


@dataclass(frozen=True)
class _Archive:
    url: str
    md5: str
    file: str


_ARCHIVES = {
    "1m": _Archive(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "c4d9eecfca2ab87c1945afe126590906",
        "ml-1m.zip",
    ),
    "100k": _Archive(
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "0e33842e24a9c977be4e0107933c0723",
        "ml-100k.zip",
    ),
}


def cache_dir() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("AMTL_CACHE", "~/.cache/amtl")).expanduser()


def load(size: str) -> pl.DataFrame:
    """Ratings joined with users and movies: `FIELDS`, `rating`, `timestamp` and `LABEL`.

    Args:
        size: `"1m"` or `"100k"`.

    Raises:
        UserError: if the archive is neither cached nor downloadable, or damaged.
    """
    path = archive(size)
    try:
        with ZipFile(path) as zipped:
            return (_parse_1m if size == "1m" else _parse_100k)(zipped)
    except (BadZipFile, KeyError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and try again") from error


def archive(size: str) -> Path:
    """Path of the checked archive, downloaded if it is not in the cache."""
    known = _ARCHIVES[size]
    path = cache_dir() / known.file
    if not path.exists():
        _download(known, path)
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != known.md5:
        raise UserError(
            f"{path} has MD5 {digest}, not the published {known.md5}; delete it and try again"
        )
    return path


def _download(known: _Archive, path: Path) -> None:
    try:
        with urllib.request.urlopen(known.url, timeout=30) as answer:
            content = answer.read()
        write_aside({path: lambda aside: aside.write_bytes(content)})
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"cannot download {known.url} ({error}). On a machine with internet access, download "
            f"it and copy it to {path}, then run the same command again"
        ) from error


def _parse_1m(zipped: ZipFile) -> pl.DataFrame:
    def table(name: str, columns: list[str]) -> pl.DataFrame:
        lines = zipped.read(f"ml-1m/{name}.dat").decode("latin-1").splitlines()
        parts = pl.Series("line", lines).str.split_exact("::", len(columns) - 1)
        return parts.struct.rename_fields(columns).struct.unnest()

    ratings = table("ratings", ["user_id", "movie_id", "rating", "timestamp"])
    users = table("users", ["user_id", "gender", "age", "occupation", "zip"])
    movies = table("movies", ["movie_id", "title", "genres"])
    return _join(ratings, users, movies)


def _parse_100k(zipped: ZipFile) -> pl.DataFrame:
    def table(name: str, separator: str) -> list[list[str]]:
        text = zipped.read(f"ml-100k/{name}").decode("latin-1")
        return [line.split(separator) for line in text.splitlines() if line]

    genre_names = [name for name, _ in table("u.genre", "|")]
    ratings = pl.DataFrame(
        table("u.data", "\t"), schema=["user_id", "movie_id", "rating", "timestamp"], orient="row"
    )
    users = pl.DataFrame(
        table("u.user", "|"), schema=["user_id", "age", "gender", "occupation", "zip"], orient="row"
    )
    movies = pl.DataFrame(
        [
            (
                row[0],
                row[1],
                "|".join(g for g, on in zip(genre_names, row[5:], strict=True) if on == "1"),
            )
            for row in table("u.item", "|")
        ],
        schema=["movie_id", "title", "genres"],
        orient="row",
    )
    return _join(ratings, users, movies)


def _join(ratings: pl.DataFrame, users: pl.DataFrame, movies: pl.DataFrame) -> pl.DataFrame:
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int64, strict=False)
    return (
        ratings.join(users, on="user_id", how="left", maintain_order="left")
        .join(movies, on="movie_id", how="left", maintain_order="left")
        .with_columns(year=year)
        .with_columns(pl.col("user_id", "movie_id", "rating", "timestamp", "age").cast(pl.Int64))
        .with_columns(label=(pl.col("rating") >= POSITIVE_RATING).cast(pl.Int8))
        .select(*FIELDS, "rating", "timestamp", LABEL)
    )
