"""Sizes are solved once per change of the parameters, and never twice the same or once too few."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from amtl import AMTLEmbedding
from amtl.layer import sizes
from torch.func import functional_call

ROWS, DIM = 300, 16
PARAMETRIZATIONS = ["ordinal", "free", "rule"]


def layer_of(parametrization="ordinal", **options):
    torch.manual_seed(0)
    counts = (4000 / torch.arange(1, ROWS + 1).pow(1.1)).long()
    options = {"bits": None, "parametrization": parametrization, **options}
    layer = AMTLEmbedding(ROWS, DIM, counts=counts, budget=0.2, **options)
    move(layer.head)
    return layer


def move(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def fresh_sizes(head):
    """Sizes that nothing was kept of."""
    twin = copy.deepcopy(head)
    assert twin._kept is None
    return twin.sizes()


@pytest.fixture
def solved(monkeypatch):
    """How often sizes were solved, and scores computed."""
    calls = {"solve": 0, "scores": 0}
    for owner in (
        sizes.OrdinalSizes,
        sizes.FreeSizes,
        sizes.RuleSizes,
    ):
        solve, scores = owner._solve, owner.scores

        def counted_solve(self, *args, solve=solve):
            calls["solve"] += 1
            return solve(self, *args)

        def counted_scores(self, *args, scores=scores):
            calls["scores"] += 1
            return scores(self, *args)

        monkeypatch.setattr(owner, "_solve", counted_solve)
        monkeypatch.setattr(owner, "scores", counted_scores)
    return calls


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_an_evaluating_model_recomputes_nothing(parametrization, solved):
    layer = layer_of(parametrization).eval()
    # Once, to tell of rows that get nothing.
    assert solved.pop("solve") == (parametrization == "rule")
    solved["solve"] = 0
    rows = torch.arange(ROWS)
    with torch.no_grad():
        first = layer(rows)
        before = dict(solved)
        assert before["solve"] == 1
        for _ in range(3):
            assert torch.equal(layer(rows), first)
        layer.row_dims(), layer.stored_fraction(), layer.stored_bytes()
    assert solved == before
    # With gradients the mask needs a graph, sizes do not.
    layer(rows)
    assert solved["solve"] == 1


@pytest.mark.parametrize("parametrization", ["ordinal", "free"])
def test_training_solves_once_a_step(parametrization, solved):
    layer = layer_of(parametrization, size_noise=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rows = torch.arange(ROWS)
    for step in range(1, 4):
        optimizer.zero_grad()
        gradients = []
        for _ in range(3):
            torch.manual_seed(step)
            layer(rows).square().sum().backward()
            gradients.append([p.grad.clone() for p in layer.parameters()])
        assert solved == {"solve": step, "scores": step}
        # Every backward gives its own gradients.
        for one, two, three in zip(*gradients, strict=True):
            torch.testing.assert_close(two, 2 * one)
            torch.testing.assert_close(three, 3 * one)
        optimizer.step()


def through_data(layer):
    for parameter in layer.head.parameters():
        parameter.data.mul_(-2)


def other_data(layer):
    for parameter in layer.head.parameters():
        parameter.data = -2 * parameter.data


def other_parameters(layer):
    for module in layer.head.modules():
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, torch.nn.Parameter(-2 * parameter.detach()))


def other_state(layer):
    other = layer_of(layer.options.parametrization)
    move(other.head, seed=5)
    layer.load_state_dict(other.state_dict())


def other_state_assigned(layer):
    other = layer_of(layer.options.parametrization)
    move(other.head, seed=5)
    layer.load_state_dict(other.state_dict(), assign=True)


def an_optimizer_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    layer(torch.arange(ROWS)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("parametrization", ["ordinal", "free"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: move(layer.head, 3),
        through_data,
        other_data,
        other_parameters,
        other_state,
        other_state_assigned,
        an_optimizer_step,
    ],
)
def test_every_change_is_seen(parametrization, change):
    layer = layer_of(parametrization).eval()
    rows = torch.arange(ROWS)
    with torch.no_grad():
        before, sizes = layer(rows), layer.head.sizes()
    change(layer)
    with torch.no_grad():
        after = layer(rows)
    assert torch.equal(layer.head.sizes(), fresh_sizes(layer.head))
    assert not torch.equal(layer.head.sizes(), sizes) and not torch.equal(after, before)
    kept = torch.arange(DIM) < layer.row_dims()[:, None]
    assert torch.equal(after, torch.where(kept, layer.weight, 0))


@pytest.mark.parametrize("parametrization", ["ordinal", "rule"])
def test_field_weights_are_seen(parametrization):
    layer = layer_of(parametrization, field_sizes=[100, 200])
    before = layer.row_dims()
    layer.head.set_field_weights([1.0, 50.0])
    assert not torch.equal(layer.row_dims(), before)
    assert torch.equal(layer.head.sizes(), fresh_sizes(layer.head))


def test_temperature_is_seen():
    layer = layer_of("free")
    with torch.no_grad():
        before = layer.head().mask
        layer.head.set_temperature(0.3)
        assert not torch.equal(layer.head().mask, before)
    assert torch.equal(layer.head().mask, layer_with_temperature(0.3).head().mask)


def layer_with_temperature(temperature):
    layer = layer_of("free")
    layer.head.set_temperature(temperature)
    return layer


def test_copies_are_independent():
    layer = layer_of().eval()
    rows = torch.arange(ROWS)
    before = layer(rows)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(rows), before)
        move(twin.head, 4)
        assert torch.equal(twin.head.sizes(), fresh_sizes(twin.head))
        assert not torch.equal(twin.head.sizes(), layer.head.sizes())
        assert torch.equal(layer(rows), before)


def test_inference_mode_leaves_nothing_that_training_trips_over():
    layer = layer_of()
    rows = torch.arange(ROWS)
    with torch.inference_mode():
        layer.eval()(rows)
    layer.train()(rows).sum().backward()
    with torch.inference_mode():
        layer(rows)
    layer(rows).sum().backward()


def test_functional_calls_see_their_parameters_only():
    layer = layer_of(size_noise=0.0)
    rows = torch.arange(ROWS)
    before = layer(rows)
    parameters = {k: v.detach().clone() for k, v in layer.named_parameters()}
    for name in parameters:
        if name.startswith("head"):
            parameters[name] *= -2
    other = functional_call(layer, parameters, (rows,))
    assert not torch.equal(other, before) and torch.equal(layer(rows), before)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(parameters, strict=False)
    assert torch.equal(twin(rows), other)


def test_replicas_keep_nothing():
    head = layer_of().head
    assert head._snapshot() is not None
    assert head._replicate_for_data_parallel()._snapshot() is None
