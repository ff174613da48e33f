"""From what was typed after `amtl train` to the settings of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from amtl.errors import UserError
from amtl.run.config import OWN, TrainConfig, parse_budget, parse_names


def refuse_idle(method: str, parametrization: str | None, given: Sequence[str]) -> None:
    """Raises a UserError for options that the method cannot obey."""
    typed = [*given, *(["parametrization"] if parametrization else [])]
    sizes = ("exponent", "capacity_bits", "freeze_at", "parametrization")
    if method == "fixed" and (idle := _first(("budget", *sizes), typed)):
        raise UserError(
            f"--{idle} has no effect with --method fixed, whose rows are "
            "all --dim wide: leave it out and choose --dim, or use --method rule or amtl"
        )
    if method not in OWN and (idle := _first(("bits", *sizes), typed)):
        raise UserError(
            f"--{idle} has no effect with --method {method}; its own "
            "settings are given by --option NAME=VALUE"
        )
    if parametrization == "paper" and "budget" in given:
        raise UserError(
            "--budget cannot hold with --parametrization paper, whose saving is an outcome of "
            "training: leave it out, or use --parametrization free, the same logits in a budget"
        )


def _first(names: Sequence[str], typed: Sequence[str]) -> str | None:
    """The first of these options that was typed, as one types it."""
    return next((name.replace("_", "-") for name in names if name in typed), None)


def make_config(
    source: Any,
    given: dict[str, Any],
    earlier: TrainConfig | None = None,
    typed: Collection[str] = (),
    *,
    label: str | None,
    **more: Any,
) -> TrainConfig:
    """Settings from the command line over the data set's recipe over the defaults.

    Args:
        source: the data.
        given: settings that may be in the recipe, too.
        earlier: settings of the run to go on from, which `going_on` then puts under those `typed`.
        typed: parameters that the command line gave.
        label: label column; None for the set's own, or that of `earlier`.
        more: the other settings, and what options of the layer are made of.
    """
    from amtl.data.readers import listed, require_columns

    drop = more.pop("drop", [])
    label = label or (earlier.label if earlier else source.label)
    if label is None:
        raise UserError(
            f"--label COLUMN is needed; columns are {listed(source.frame.columns)}. If all rows "
            "are positive, as of what was bought or played, --negatives USER:ITEM draws others"
        )
    require_columns(source.frame.columns, [label], "the data")
    if label in more["fields"]:
        raise UserError(f"--fields names the label {label!r}, which is what is predicted")
    from amtl.run.contest import untried
    from amtl.run.methods import ALIASES

    laws, parametrization = more.pop("laws", {}), more.pop("parametrization", None)
    more["method"], named = ALIASES.get(more["method"], (more["method"], {}))
    settings = {**source.settings(more["method"]), **given, **more}
    options = {**settings.pop("table_options", {}), **named, **settings.pop("options")}
    if len(laws) > 1:
        raise UserError("--exponent and --capacity-bits are two laws of the count: give one")
    for name, value in laws.items():
        options[{"exponent": "init_exponent"}.get(name, name)] = value
    if parametrization == "paper":
        options |= {"parametrization": "free", "budget": None}
    elif parametrization is not None:
        options["parametrization"] = parametrization
    config = untried(TrainConfig(data=source.name, label=label, table_options=options, **settings))
    if drop:
        from amtl.data.columns import called
        from amtl.run.preparation import default_fields

        columns = source.frame.columns
        require_columns(columns, [n for n in drop if not called(source.frame, n)], "the data")
        config.drop = list(drop)
        kept = config.fields or default_fields(source.frame, config, source)
        kept = [name for name in kept if name not in drop]
        config.fields = kept if config.fields else []
        if not kept:
            raise UserError("--drop leaves no column to use")
    return going_on(config, earlier, typed) if earlier else config


_FIELDS = ("fields", "drop", "numeric", "default_numeric", "values", "separators")
_KEPT = (
    *("dim", "backbone", "table_optimizer", "min_count", "weight", "negatives"),
    *("label_threshold", "label_positive", "label_missing"),
)
_LAWS = ("exponent", "capacity_bits", "parametrization", "option")


def going_on(config: TrainConfig, earlier: TrainConfig, typed: Collection[str]) -> TrainConfig:
    """Settings of a run that goes on from another: those of the other one, but for what was typed.

    Nothing that was settled is tried again; with another method all but the fields is open.

    Args:
        config: what the command line says, defaults where it says nothing.
        earlier: settings of the run to go on from.
        typed: parameters that the command line gave.

    Raises:
        UserError: fields are to be taken otherwise.
    """
    for name in ("fields", "drop", "numeric", "values", "multi"):
        if name in typed:
            raise UserError(
                f"--{name} has no effect with --warm-start, which takes the fields of that run as "
                "they were: leave it out, or train anew without --warm-start"
            )
    kept = {name: getattr(earlier, name) for name in _FIELDS}
    if "method" in typed and config.method != earlier.method:
        kept |= {name: getattr(earlier, name) for name in _KEPT if name not in typed}
        return replace(config, **kept, hidden=earlier.hidden)
    now: dict[str, Any] = {"race": False, "distillation": config.distillation or 0.0}
    for name in typed:
        name = {"hide_unseen": "hides", "option": "table_options"}.get(name, name)
        if name == "budget":
            now |= {"budget": config.budget, "budget_bytes": config.budget_bytes}
        elif name in _LAWS:
            now["table_options"] = {**earlier.table_options, **config.table_options}
        elif hasattr(config, name):
            now[name] = getattr(config, name)
    if "table_optimizer" in typed and "table_lr" not in typed:
        now["table_lr"] = None
    # As many steps an epoch as the new rows are for.
    as_new = ("data", "warm_start", "compare", "batch_size")
    now |= {name: getattr(config, name) for name in as_new}
    return replace(earlier, skip_rows=0, **now)


def parse_seconds(option: str, text: str | None) -> float | None:
    """Seconds of what was typed for a time: a number of them, or one with s, m or h; None for None.

    Raises:
        UserError: it is neither, or nothing.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([smh]?)", text.strip().lower())
    seconds = float(found[1]) * {"h": 3600, "m": 60}.get(found[2], 1) if found else 0.0
    if not seconds > 0:
        raise UserError(f"{option} {text!r}: a time above 0 is needed, such as 90s, 10m or 1.5h")
    return seconds


def not_applied(typed: Mapping[str, Any], config: TrainConfig, rows: int) -> list[str]:
    """What was typed beside --resume and differs from the run in the folder, as one types it.

    Args:
        typed: what the command line gave, by parameter.
        config: settings that the run was asked for.
        rows: of its table.
    """
    about = [name for name in typed if name not in ("out", "resume", "force", "time_limit", "jobs")]
    differ = [name for name in about if not _holds(name, typed, config, rows)]
    return ["DATA" if name == "data" else f"--{name.replace('_', '-')}" for name in differ]


def _holds(name: str, typed: Mapping[str, Any], config: TrainConfig, rows: int) -> bool:
    """Whether a run has what was typed for a parameter of `amtl train`."""
    from amtl.run.methods import ALIASES

    value, options = typed[name], config.table_options
    dropped = parse_names("--drop", typed.get("drop"))
    if name == "data":
        kind, _, path = value.partition(":")
        return config.data in (value, str(Path(value).resolve()), f"{kind}:{Path(path).resolve()}")
    if name == "fields":
        names = parse_names("--fields", value, config.fields)
        return config.fields == [n for n in names if n not in dropped]
    if name == "drop":
        # Runs of before have what was left over alone.
        left_over = bool(config.fields) and not set(dropped) & set(config.fields)
        return set(dropped) <= set(config.drop) or left_over
    if name == "method":
        method, named = ALIASES.get(value, (value, {}))
        return config.method == method and named.items() <= options.items()
    if name == "option":
        return parse_options(config.method, value).items() <= options.items()
    if name == "numeric":
        parsed = parse_columns(value, [], config.numeric)
        return all(getattr(config, key) == parsed[key] for key in ("numeric", "default_numeric"))
    if name == "multi":
        return bool(config.separators == parse_columns([], value, config.separators)["separators"])
    if name == "parametrization":
        has = options.get(name, "rule") if options.get("budget", 0) is not None else "paper"
        return bool(has == value)
    if name in ("exponent", "capacity_bits"):
        return options.get({"exponent": "init_exponent"}.get(name, name)) == value
    if name == "budget":
        value = replace(config, **parse_budget(value)).with_rows(rows).budget
    return bool(getattr(config, name) == (str(value) if isinstance(value, Path) else value))


def parse_options(method: str, given: Sequence[str]) -> dict[str, Any]:
    """Parses --option."""
    from amtl.peers import PEERS

    if given and method not in PEERS:
        raise UserError(f"--option is for methods of the field: {', '.join(PEERS)}")
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text}: write NAME=VALUE")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def parse_columns(
    numeric: Sequence[str], multi: Sequence[str], known: Collection[str] = ()
) -> dict[str, Any]:
    """Parses --numeric and --multi.

    What stands before the last = of an argument is one name if that is `known`, whatever commas,
    spaces or = it holds.
    """
    treatments: dict[str, str] = {}
    default = "bucket"
    for part in (part for given in numeric for part in _apart(given, ",", known)):
        column, equals, treatment = part.rpartition("=")
        column = column if column in known else column.lstrip()
        if equals:
            treatments[column] = treatment.strip()
        else:
            default = treatment.strip()
    separators: dict[str, str] = {}
    # A separator may be a comma; one that is followed by NAME= begins the next column.
    for part in (part for given in multi for part in _apart(given, r",(?=[^,=]+=)", known)):
        column, equals, separator = part.partition("=")
        if part in known:
            column, equals = part, ""
        elif part.rpartition("=")[0] in known:
            column, _, separator = part.rpartition("=")
        separators[column] = separator if equals else "|"
    return {"numeric": treatments, "default_numeric": default, "separators": separators}


def _apart(given: str, between: str, known: Collection[str]) -> list[str]:
    """What was typed for several columns, each for itself."""
    whole = given in known or given.rpartition("=")[0] in known
    return [given] if whole else re.split(between, given)
