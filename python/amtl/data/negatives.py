"""Rows that did not happen, for files of those that did: what a user bought, played or opened.

Such files have no label, for all of their rows are positive. For each of them rows are drawn in
which the same user, in the same context, has another item, one that no row of the file gives this
user.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from amtl.data import calendar
from amtl.data.columns import numbered
from amtl.data.readers import require_columns
from amtl.errors import UserError, listed

LABEL = "label"
"""What the column of the labels is called."""

_TRIES = 50
"""Draws after which a user is taken to have nearly all items."""
_SAME = 0.5
"""Agreement of rows of one item, beyond that of any two, from which a column is about items."""
_PAIRS, _CHANCE = 200_000, 20_000
"""Pairs of rows that are looked at for it: of one item, and any."""
_GIVEN_AWAY, _ROWS = 0.2, 200_000
"""How many more drawn rows than others, of all, may have a value that is new beside their item
before it is said; and rows that are looked at for it, but for those of the last item."""

Places = NDArray[np.int64]


class Negatives(NamedTuple):
    """What to draw.

    Attributes:
        user, item: columns.
        each: rows drawn for each row of the file.
    """

    user: str
    item: str
    each: int

    @classmethod
    def of(cls, text: str, columns: list[str]) -> Negatives:
        """From `USER:ITEM` or `USER:ITEM:COUNT`.

        Raises:
            UserError: it is written otherwise, or names no columns.
        """
        user, _, rest = text.partition(":")
        item, colon, number = rest.rpartition(":")
        if not colon or not number.isdecimal():
            item, number = rest, "1"
        if not user or not item or user == item or int(number) < 1:
            raise UserError(
                f"--negatives {text!r}: USER:ITEM or USER:ITEM:COUNT is needed, two columns and "
                "how many rows to draw for each row, such as user:song:4"
            )
        require_columns(columns, [user, item], "the data")
        return cls(user, item, int(number))


def has_labels(frame: pl.DataFrame) -> bool:
    """Whether there is a column `LABEL` of more than one value."""
    return LABEL in frame.columns and frame[LABEL].n_unique() > 1


def with_negatives(frame: pl.DataFrame, text: str) -> tuple[pl.DataFrame, str]:
    """The rows of a file, each followed by those drawn for it, and a note on what was drawn.

    Items are drawn alike, whether many have them or few. Columns about the item come along, from
    a row that has it: those that the item settles, as a title, or that hardly differ between its
    rows, as a price. All others, and the time of the row, stay.

    Args:
        frame: without labels, or with a column of them that holds but one value.
        text: see `Negatives.of`.

    Returns:
        The rows with a column `LABEL`, 1 where they are of the file and 0 where they were drawn;
        always the same ones for the same rows. O(rows * count).

    Raises:
        UserError: there are labels already, there is nothing to draw, or see `Negatives.of`.
    """
    wanted = Negatives.of(text, frame.columns)
    if has_labels(frame):
        raise UserError(
            f"--negatives is for files of positive rows only, and column {LABEL!r} has more than "
            "one value: leave --negatives out, or rename the column"
        )
    frame = frame.drop(LABEL, strict=False)
    user, item = (_numbers(frame, name) for name in wanted[:2])
    users, items = int(user.max(initial=-1)) + 1, int(item.max(initial=-1)) + 1
    if items < 2:
        raise UserError(f"--negatives {text}: column {wanted.item!r} holds {items} value(s)")
    rng = np.random.default_rng(0)
    drawn = _draw(user, item, items, wanted.each, rng)
    if not (drawn >= 0).any():
        raise UserError(f"--negatives {text}: every one of {users:,} users has all {items:,} items")
    about = _about_items(frame, wanted, user, item, rng)
    context = np.repeat(np.arange(len(frame)), wanted.each + 1).reshape(len(frame), -1)
    place = np.concatenate([context[:, :1], _rows_with(item, items, drawn, rng)], 1)
    kept = place >= 0
    labels = np.broadcast_to(np.arange(wanted.each + 1) == 0, kept.shape)[kept]
    rows = frame[context[kept]].with_columns(
        *frame.select(wanted.item, *about)[place[kept]],
        pl.Series(LABEL, labels.astype(np.int8)),
    )
    along = f", with its {listed(about)}" if about else ""
    note = (
        f"{len(rows) - len(frame):,} negative rows were drawn (--negatives): a {wanted.user} with "
        f"another {wanted.item}{along}"
    )
    stays = frame.drop(wanted.user, wanted.item, *about)
    for name, new, usual in _giveaways(stays, user, item, drawn, rng):
        note += (
            f"; {new:.0%} of them hold a value of {name!r} that no row with their {wanted.item} "
            f"has, as {usual:.0%} of the others do, which gives them away: if it belongs to the "
            f"{wanted.item}, --drop {shlex.quote(name)}"
        )
    return rows, note


def _numbers(frame: pl.DataFrame, name: str) -> Places:
    """The values of a column, numbered; the missing one is the last."""
    column = frame[name]
    if column.dtype.is_nested():
        raise UserError(f"--negatives: column {name!r} holds lists; one value a row is needed")
    found = numbered(column)
    return np.where(found < 0, found.max(initial=-1) + 1, found)


def _draw(user: Places, item: Places, items: int, count: int, rng: np.random.Generator) -> Places:
    """Items for each row that its user has no row with, [n, count]; -1 where none was found."""
    seen = np.unique(user * items + item)
    drawn = np.full((len(user), count), -1)
    for _ in range(_TRIES):
        row, column = np.nonzero(drawn < 0)
        if not len(row):
            break
        found = rng.integers(items, size=len(row))
        key = user[row] * items + found
        known = seen[np.minimum(np.searchsorted(seen, key), len(seen) - 1)] == key
        drawn[row, column] = np.where(known, -1, found)
    return drawn


def _rows_with(item: Places, items: int, drawn: Places, rng: np.random.Generator) -> Places:
    """A row of each drawn item, -1 where none was drawn."""
    order = np.argsort(item, kind="stable")
    starts = np.searchsorted(item[order], np.arange(items + 1))
    counts = np.diff(starts)
    wanted = np.maximum(drawn, 0)
    any_of = (rng.random(drawn.shape) * counts[wanted]).astype(np.int64)
    return np.where(drawn < 0, -1, order[starts[wanted] + any_of])


def _about_items(
    frame: pl.DataFrame, wanted: Negatives, user: Places, item: Places, rng: np.random.Generator
) -> list[str]:
    """Columns that say something of the item and not of the user or the moment."""
    names = [name for name in frame.columns if name not in wanted[:2]]
    if len(np.unique(item)) == len(item):
        return []
    by_item, by_user = _pairs(item, rng), _pairs(user, rng)
    chance = rng.integers(len(frame), size=(2, _CHANCE))
    found = []
    for name in names:
        of_item, of_user = _agreements(frame[name], chance, by_item, by_user)
        if of_item == 1 or (
            of_item >= _SAME and of_item > of_user and not calendar.has_moments(frame[name])
        ):
            found.append(name)
    return found


def _giveaways(
    stays: pl.DataFrame, user: Places, item: Places, drawn: Places, rng: np.random.Generator
) -> Iterator[tuple[str, float, float]]:
    """Columns that drawn rows keep, though their new items hardly ever have such values.

    So is a price where items have several, by their sizes: beside another item it is none of its.
    Rows of the file are held to the same: rows of their own users do not count, and items count
    as often as they were drawn.

    Yields:
        Name, and the shares of drawn rows, and of those of the file, of whose item no row has that
        value.
    """
    often = np.bincount(item)
    order = rng.permutation(len(often))
    looked = np.zeros(len(often), bool)
    looked[order[: 1 + np.searchsorted(np.cumsum(often[order]), _ROWS)]] = True
    real = np.flatnonzero(looked[item])
    row, column = np.nonzero((drawn >= 0) & looked[np.maximum(drawn, 0)])
    new_item = drawn[row, column]
    weight = (np.bincount(new_item, minlength=len(often)) / often)[item[real]]
    for name in stays.columns:
        if not len(row) or stays[name].dtype.is_nested():
            continue
        value = _numbers(stays, name)
        pair, new_pair = item * len(value) + value, new_item * len(value) + value[row]
        # Each pair of item and value once for each of its users.
        by_user = pl.DataFrame({"pair": pair[real], "user": user[real]}).unique()
        users = by_user.group_by("pair").len()
        alone = users.filter(len=1)["pair"].to_numpy()
        new = float(np.isin(new_pair, users["pair"].to_numpy(), invert=True).mean())
        usual = float(np.average(np.isin(pair[real], alone), weights=weight))
        if new - usual > _GIVEN_AWAY:
            yield name, new, usual


def _pairs(group: Places, rng: np.random.Generator) -> Places:
    """Two rows of the same group each, [2, pairs]."""
    shuffled = rng.permutation(len(group))
    order = shuffled[np.argsort(group[shuffled], kind="stable")]
    pairs = np.stack([order[:-1], order[1:]])[:, group[order[:-1]] == group[order[1:]]]
    if pairs.shape[1] > _PAIRS:
        pairs = pairs[:, rng.choice(pairs.shape[1], _PAIRS, replace=False)]
    return pairs


def _agreements(column: pl.Series, chance: Places, *pairs: Places) -> list[float]:
    """How far two rows of each kind of pair agree, from 0 for no more than any two to 1 for always.

    By equal values, or, of numbers, by the correlation of their ranks.
    """
    if isinstance(column.dtype, pl.List) and not column.dtype.inner.is_nested():
        column = column.cast(pl.List(pl.String)).list.join("\n")
    if column.dtype.is_nested():
        return [0.0] * len(pairs)
    rank = column.rank("average").fill_null(0).to_numpy()
    by_chance = float((rank[chance[0]] == rank[chance[1]]).mean())
    return [_agreement(rank[two], by_chance, column.dtype.is_numeric()) for two in pairs]


def _agreement(ranks: NDArray[np.float64], by_chance: float, numeric: bool) -> float:
    """Of the ranks of pairs, [2, pairs]; see `_agreements`."""
    if not ranks.shape[1] or by_chance == 1:
        return 0.0
    first, second = ranks
    agreement = float(((first == second).mean() - by_chance) / (1 - by_chance))
    if agreement < 1 and numeric and first.std() and second.std():
        agreement = max(agreement, min(float(np.corrcoef(first, second)[0, 1]), 1 - 1e-9))
    return agreement
