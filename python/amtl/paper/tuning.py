"""Which choice is tried next: the default first, then what optuna suggests."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from amtl.errors import UserError

_DRAWS = 50


def next_choice(
    space: Mapping[str, Sequence[Any]],
    tried: Sequence[tuple[Mapping[str, Any], float | None]],
    of: str,
    first: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any] | None:
    """A choice not tried yet, the same whenever the same ones were.

    Args:
        space: names to values, the default first.
        tried: choices and their scores, in order; None of those that did not fit.
        of: name of what is tuned, which suggestions depend on.
        first: changes that are tried first, one after the other, each of the best choice so far;
            those that a choice has had already are left out.

    Returns:
        A choice, or None where all were tried or none is found.

    Raises:
        UserError: optuna is missing.
    """
    if not tried:
        return {name: values[0] for name, values in space.items()}
    best, _ = max(tried, key=lambda t: -math.inf if t[1] is None else t[1])
    for change in first:
        if not any(change.items() <= choice.items() for choice, _ in tried):
            return {**best, **change}
    if len(tried) >= math.prod(len(values) for values in space.values()):
        return None
    try:
        import optuna
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState, create_trial
    except ImportError as error:
        raise UserError(
            'tuning needs optuna; run: pip install "amtl-kernels[paper]", or ask for --trials 1'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: CategoricalDistribution(list(v)) for name, v in space.items()}
    seen = {_key(choice) for choice, _ in tried}
    seed = zlib.crc32(f"{of} {len(tried)}".encode())
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for choice, score in tried:
        study.add_trial(
            create_trial(
                params=dict(choice),
                distributions=distributions,  # type: ignore[arg-type]
                value=score,
                state=TrialState.FAIL if score is None else TrialState.COMPLETE,
            )
        )
    for _ in range(_DRAWS):
        choice = study.ask(distributions).params  # type: ignore[arg-type]
        if _key(choice) not in seen:
            return {name: choice[name] for name in space}
    return None


def _key(choice: Mapping[str, Any]) -> str:
    return json.dumps(choice, sort_keys=True)
