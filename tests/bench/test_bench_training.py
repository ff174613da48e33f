"""Whole training steps with a network on top of the tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.contenders import CONTENDERS
from bench.inputs import Case, make_problem

CASE = Case(
    "step", 50, ("amtl_search",), (), optimizer="rowwise_adagrad", tables=3, dim=8, bags=32,
    bag_size=1, distribution="zipf", threads=1, dense=(4,),
)  # fmt: skip


@pytest.mark.parametrize("name", ["fbgemm", "torchrec_fused", "amtl_search", "amtl_layer"])
def test_a_training_step_reaches_the_table(name: str) -> None:
    contender = CONTENDERS[name]
    if contender.absent():
        assert contender.install
        return
    problem = make_problem(CASE)
    session = contender.prepare(problem)
    before = session.outcome(0).output.clone()
    for _ in range(3):
        session.call(0)
    after = session.outcome(0).output
    assert not torch.equal(before, after)
    assert bool(torch.isfinite(after).all())


def test_everybody_trains_the_same_network_on_the_same_order_of_fields() -> None:
    outputs = {}
    for name in ("amtl_search", "amtl_masked", "fbgemm"):
        contender = CONTENDERS[name]
        if contender.absent():
            continue
        problem = make_problem(dataclasses.replace(CASE, row_mean=1.0, noise=False))
        session = contender.prepare(problem)
        session.call(0)
        session.call(1)
        outputs[name] = session.outcome(2).output
    wanted = outputs["amtl_masked"]
    for name, output in outputs.items():
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5, msg=name)
