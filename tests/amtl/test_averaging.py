"""What is validated and kept is the average of a model's numbers over its last steps."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.registry import Source
from amtl.run.averaging import Average
from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.preparation import prepare
from hypothesis import given, settings
from hypothesis import strategies as st

BATCH, ROWS = 20, 1500


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    user, item = rng.zipf(1.4, ROWS) % 60, rng.zipf(1.4, ROWS) % 40
    logit = (rng.normal(size=(60, 3))[user] * rng.normal(size=(40, 3))[item]).sum(1)
    label = (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int)
    frame = pl.DataFrame({"user": user, "item": item, "label": label})
    return prepare(config(), Source("made here", frame, "label"))


def config(**changes) -> TrainConfig:
    given = {"method": "fixed", "dim": 8, "batch_size": BATCH, "race": False, "epochs": 4}
    return TrainConfig("made here", "label", **{**given, "validations": 2, **changes})


def live(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


@given(st.floats(1, 40), st.integers(1, 60))
@settings(max_examples=40)
def test_it_is_the_average_of_what_it_was_told(reach, steps):
    told = [torch.tensor([float(i) ** 2, -float(i)]) for i in range(1, steps + 1)]
    average, expected, number = Average(reach), None, told[0].clone()
    for i, value in enumerate(told, 1):
        number.copy_(value)
        average.step([number])
        if i % 4 == 0:
            share = 1.0 if expected is None else min(1.0, 4 / max(1.0, min(reach, i / 2)))
            expected = value if expected is None else expected + share * (value - expected)
    with average.shown([number]):
        within = number.clone()
    assert torch.equal(number, told[-1])
    torch.testing.assert_close(within, told[-1] if expected is None else expected)


def test_large_tables_are_taken_in_less_often():
    average, number = Average(1e9), torch.zeros(3 << 20)
    for i in range(1, 14):
        number.fill_(i)
        average.step([number])
    with average.shown([number]):
        # After 7 steps, and then 14 would be.
        assert float(number[0]) == 7


def same_but_unseen(mine: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all is equal but the rows of two fields' unseen values, which validation settles."""
    return int((mine != other).sum()) <= (2 * 8 if len(mine) > 64 else 0)


@pytest.mark.parametrize("given", [{}, {"method": "amtl", "bits": "4"}], ids=["full", "few bits"])
def test_what_is_kept_is_the_average_and_training_goes_on_as_without(task, given):
    learner, alone = (Learner(config(hidden=(32,), **given), task) for _ in range(2))
    alone._averaged = list
    average = Average(learner._average._steps)
    while not (learner.history and learner.history[-1]["best"]):
        learner.step(), alone.step()
        average.step(live(learner))
    assert learner.stage == 0
    assert all(map(same_but_unseen, live(learner), live(alone)))
    numbers = live(learner)
    with average.shown(numbers):
        kept = [learner.best["model"][name] for name, _ in learner.model.named_parameters()]
        assert all(map(same_but_unseen, kept, numbers))
    assert not any(map(same_but_unseen, kept, live(alone)))


def test_a_stage_starts_from_the_average_and_with_a_new_one(task):
    learner = Learner(config(epochs=30, patience=2), task)
    while learner.stage == 0:
        kept = None if learner.best is None else dict(learner.best["model"])
        learner.step()
    assert kept is not None
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, learner.best["model"][name])
    assert learner._average.state() == {"since": 0, "values": []}


@pytest.mark.parametrize("decay", [0.0, 1e-4])
@pytest.mark.parametrize("ahead", [-0.1, 0.1])
def test_a_stage_with_decay_lasts_while_the_numbers_are_ahead_of_their_average(task, decay, ahead):
    learner = Learner(config(epochs=200, patience=2, embedding_decay=decay), task)
    shown, within = learner._average.shown, []

    @contextmanager
    def noted(numbers):
        with shown(numbers):
            within.append(True)
            yield
            within.pop()

    learner._average.shown = noted
    learner.scores = lambda: (0.6 if within else 0.6 + ahead, 0.5)
    while len(learner.history) < 12:
        learner.step()
    assert (learner.stage == 0) == (ahead > 0 and decay > 0)


def test_sizes_that_are_searched_are_validated_as_they_are(task):
    search = config(method="amtl", bits="32", table_options={"parametrization": "ordinal"})
    learner = Learner(search, task)
    learner.step()
    assert not learner._averaged()
    learner.freeze()
    learner.step()
    assert learner._averaged() and learner._average.state()["since"] == 1


def test_codes_without_masters_have_no_average(task):
    learner = Learner(config(method="amtl", bits="8", masters=False, table_optimizer="sgd"), task)
    assert learner.frozen and not learner._averaged()
