"""The weight of a frozen layer, which can be read."""

from __future__ import annotations

import copy
from functools import partial

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer import shown
from amtl.layer.shown import NoWeightError, ShownRows
from torch import nn
from torch.nn import functional as F

from amtl_kernels import optim

pytestmark = pytest.mark.every(2)

ROWS, DIM = 40, 8
COUNTS = torch.arange(ROWS) ** 2


def frozen(kind=AMTLEmbedding, **options):
    torch.manual_seed(3)
    masters = options.pop("masters", True)
    options = {"counts": COUNTS, "budget": 0.3, "bits": None, **options}
    return kind(ROWS, DIM, **options).freeze(masters=masters)


KINDS = {
    "floats": {},
    "4 bits": {"bits": 4, "budget": 0.1},
    "16 bits": {"bits": 16},
    "codes": {
        "bits": 8,
        "masters": False,
        "fused_optimizer": partial(optim.RowwiseAdagrad, lr=0.1),
    },
    "shared rows": {"shared_rows": "rarest", "min_dim": 0, "budget": 0.05},
    "padding": {"padding_idx": 3},
    "bags": {"kind": AMTLEmbeddingBag},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_shows_what_lookups_show(kind, training):
    layer = frozen(**KINDS[kind]).train(training)
    with torch.no_grad():
        rows = layer.weight.clone()
        assert type(rows) is torch.Tensor
        assert torch.equal(layer.weight, rows) and torch.equal(rows, layer.weight.detach())
    if isinstance(layer, AMTLEmbedding) and not training:
        with torch.no_grad():
            assert torch.equal(rows, layer(torch.arange(ROWS)))
    if not training:
        assert torch.equal(rows, layer.dense_weight())


READS = {
    "product": lambda h, weight: h @ weight.T,
    "linear": F.linear,
    "joined": lambda h, weight: torch.cat([h, weight])[-ROWS:] * 2.0,
    "scaled": lambda h, weight: h @ F.normalize(weight, dim=-1).mT,
    "einsum": lambda h, weight: torch.einsum("bd,nd->bn", h, weight),
    "norm": lambda h, weight: weight.norm() + h.sum(),
    "lookup": lambda h, weight: F.embedding(torch.tensor([3, 3, 1]), weight) + h,
    "rows": lambda h, weight: weight[torch.tensor([3, 3, 1])] + h,
    "graph": lambda h, weight: torch.sparse.mm(torch.eye(ROWS).to_sparse(), weight) + h[0],
    "no tensor first": lambda h, weight: 2.0 - weight / (1 + weight.square()),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("read", READS)
def test_gradients_are_those_of_a_lookup_of_all_rows(read, bits):
    grads = []
    for explicit in (False, True):
        layer = frozen(bits=bits, budget=0.3 if bits is None else 0.1)
        torch.manual_seed(5)
        h = torch.randn(3, DIM, requires_grad=True)
        out = READS[read](h, layer(torch.arange(ROWS)) if explicit else layer.weight)
        assert type(out) is torch.Tensor
        (out * torch.randn(out.shape)).sum().backward()
        grads.append([out.detach(), h.grad, *(block.grad for block in layer.blocks)])
    assert all(grad is not None for grad in grads[0][2:])
    for got, expected in zip(*grads, strict=True):
        assert (got is expected is None) or torch.equal(got, expected)


H = torch.randn(3, 2, DIM, generator=torch.Generator().manual_seed(1))
BIAS = torch.arange(ROWS) / 7
SCORES = {
    "T": lambda w: H @ w.T,
    "t": lambda w: H.matmul(w.t()),
    "mT": lambda w: torch.matmul(H[0, 0], w.mT),
    "transpose": lambda w: torch.mm(H[0], w.transpose(0, 1)),
    "twice": lambda w: F.linear(H[0], w.T.transpose(-1, -2)),
    "detached": lambda w: H @ w.detach().mH.data,
    "linear": lambda w: F.linear(H, w, BIAS),
    "linear with a bias by name": lambda w: F.linear(H[0, 0], w, bias=BIAS),
    "nobody": lambda w: H[:0] @ w.T,
}
NOT_SCORES = {
    "rows first": lambda w: w @ H[0].T,
    "columns, not turned": lambda w: F.linear(BIAS, w.T),
    "picked columns": lambda w: w.T[:, torch.tensor([3, 1])],
    "a column": lambda w: w.T[2] + w.t().index_select(0, torch.tensor([1]))[0],
    "looked up in columns": lambda w: F.embedding(torch.tensor([3, 1]), w.T),
    "both": lambda w: w @ w.T,
    "another product": lambda w: torch.einsum("bcd,dn->bcn", H, w.T),
}


@pytest.mark.parametrize("bits, bounds_check", [(None, "raise"), (4, "clamp")])
@pytest.mark.parametrize("name", [*SCORES, *NOT_SCORES])
def test_all_rows_are_scored_some_at_a_time(name, bits, bounds_check, monkeypatch):
    layer = frozen(bits=bits, budget=0.3 if bits is None else 0.1, bounds_check=bounds_check)
    made, real = [], layer._all_rows
    monkeypatch.setattr(layer, "_all_rows", lambda rows=None: made.append(rows) or real(rows))
    monkeypatch.setitem(shown._PART_BYTES, "cpu", 16 * DIM * 4)
    score = {**SCORES, **NOT_SCORES}[name]
    with torch.no_grad():
        got, want = score(layer.weight), score(real(None))
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, want)
    if name in SCORES:
        assert made == [range(16), range(16, 32), range(32, 40)]
    else:
        assert set(made) == {None}
    # What gradients need is made at once.
    made.clear()
    learns = name != "detached"
    assert score(layer.weight).requires_grad == (None in made) == learns


def test_columns_know_their_shape_and_are_not_written_to():
    columns = frozen().weight.T
    assert columns.shape == (DIM, ROWS) and columns.requires_grad and not columns.is_leaf
    assert columns.T.shape == (ROWS, DIM)
    assert torch.equal(columns.detach(), frozen().weight.detach().clone().T)
    with pytest.raises(RuntimeError, match="frozen"):
        columns.add_(1)
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied"):
        torch.randn(2, DIM + 1) @ columns


def test_one_reading_is_made_once_for_either_mode(monkeypatch):
    layer, made = frozen(), []
    real = layer._all_rows
    monkeypatch.setattr(layer, "_all_rows", lambda rows: made.append(0) or real(rows))
    weight = layer.weight
    assert weight.shape == (ROWS, DIM) and weight.size(1) == DIM and len(weight) == ROWS
    assert (weight.dtype, weight.device, weight.ndim) == (torch.float32, layer.device, 2)
    assert weight.numel() == ROWS * DIM and not weight.is_cuda and not weight.is_leaf
    assert weight.requires_grad and not made
    assert (weight + weight).requires_grad and len(made) == 1
    with torch.no_grad():
        assert not weight.sum().requires_grad and len(made) == 2
    assert layer.weight.sum().requires_grad and len(made) == 3
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad and not layer.weight.sum().requires_grad


IDS = torch.tensor([[3, 3], [1, 39]])
PICKS = {
    "indices": lambda w: w[IDS],
    "int32": lambda w: w[IDS.int()],
    "below zero": lambda w: w[-1 - IDS],
    "no indices": lambda w: w[IDS[:0]],
    "a number": lambda w: w[-2],
    "a scalar": lambda w: w[torch.tensor(7)],
    "a slice": lambda w: w[2:30:3],
    "half open": lambda w: w[-5:],
    "a mask": lambda w: w[torch.arange(ROWS) % 3 == 0],
    "embedding": lambda w: F.embedding(IDS, w),
    "index_select": lambda w: w.index_select(0, IDS[0]),
    "torch.index_select": lambda w: torch.index_select(w, -2, IDS[1].int()),
}
OTHERS = {
    "columns": lambda w: w[:, 2],
    "rows and columns": lambda w: w[IDS, 1],
    "a list": lambda w: w[[1, 2]],
    "a new axis": lambda w: w[None],
    "an ellipsis": lambda w: w[..., 0],
    "a full mask": lambda w: w[torch.arange(ROWS * DIM).view(ROWS, DIM) % 5 == 0],
    "columns by index": lambda w: w.index_select(1, IDS[0]),
    "padding": lambda w: F.embedding(IDS, w, padding_idx=3),
    "scaled": lambda w: F.embedding(IDS, w, None, None, 2.0, True),
    "bytes": lambda w: w[torch.ones(ROWS, dtype=torch.uint8)],
}


@pytest.mark.every(3)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("pick", [*PICKS, *OTHERS])
def test_rows_that_are_picked_are_looked_up_and_no_others(pick, bits, monkeypatch):
    layer, looked_up = frozen(bits=bits, budget=0.3), []
    of = {**PICKS, **OTHERS}[pick]
    dense = layer.dense_weight().requires_grad_()
    expected = of(dense)
    real = layer._embed
    monkeypatch.setattr(layer, "_embed", lambda ids: looked_up.append(ids.numel()) or real(ids))
    found = of(layer.weight)
    assert torch.equal(found, expected) and found.shape == expected.shape
    assert looked_up == [expected.numel() // DIM if pick in PICKS else ROWS]
    if found.numel():
        found.square().sum().backward()
        assert all(block.grad is not None for block in layer.blocks)
    with torch.no_grad():
        assert not of(layer.weight).requires_grad


@pytest.mark.parametrize("bounds", ["raise", "clamp", "off"])
def test_rows_that_are_not_there_are_an_error(bounds):
    weight = frozen(bounds_check=bounds).weight
    for pick in (
        lambda: weight[torch.tensor([ROWS])],
        lambda: weight[torch.tensor([-ROWS - 1])],
        lambda: weight[ROWS],
        lambda: F.embedding(torch.tensor([-1]), weight),
        lambda: weight.index_select(0, torch.tensor([-1])),
    ):
        with pytest.raises(IndexError):
            pick()


def test_who_holds_it_sees_what_training_makes_of_it():
    layer = frozen()
    weight, optimizer = layer.weight, torch.optim.SGD(layer.table_parameters(), lr=0.5)
    before = weight.detach().clone()
    for _ in range(2):
        weight.square().sum().backward()
        optimizer.step()
    assert not torch.equal(weight.detach().clone(), before)
    assert torch.equal(weight.detach().clone(), layer.dense_weight())


WRITES = {
    "copy_": lambda w: w.copy_(torch.zeros(ROWS, DIM)),
    "init": nn.init.xavier_normal_,
    "init by name": lambda w: nn.init.uniform_(tensor=w),
    "row": lambda w: w.__setitem__(0, 0.0),
    "+=": lambda w: w.__iadd__(1.0),
    "data": lambda w: w.data.normal_(),
    "row of data": lambda w: w.data.__setitem__(0, 0.0),
    "detached": lambda w: w.detach().zero_(),
    "hook": lambda w: w.register_hook(print),
    "to data": lambda w: setattr(w, "data", torch.zeros(ROWS, DIM)),
    "grad": lambda w: w.grad,
    "to grad": lambda w: setattr(w, "grad", None),
    "out": lambda w: torch.add(torch.ones(ROWS, DIM), 1, out=w),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
}


@pytest.mark.parametrize("write", WRITES)
def test_it_cannot_be_written_to(write):
    layer = frozen().eval()
    before = layer.dense_weight()
    with torch.no_grad(), pytest.raises(NoWeightError, match=r"frozen.*torch.arange\(40\)"):
        WRITES[write](layer.weight)
    assert torch.equal(layer.dense_weight(), before)


def test_its_data_are_read():
    layer = frozen()
    for read in (lambda w: w.data, lambda w: w.detach(), torch.detach):
        rows = read(layer.weight)
        assert rows.shape == (ROWS, DIM) and not rows.requires_grad
        assert torch.equal(rows.cpu(), layer.dense_weight())
        assert (rows.numpy() == layer.dense_weight().numpy()).all()


def test_it_is_no_parameter():
    layer, other = frozen().eval(), nn.Linear(DIM, ROWS)
    optimizer = torch.optim.Adam(layer.table_parameters())
    what = r"table_parameters\(\): they are for an optimizer"
    with torch.no_grad(), pytest.raises(NoWeightError, match=what):
        torch.optim.SGD([layer.weight], lr=0.1)
    with pytest.raises(NoWeightError, match=what):
        optimizer.add_param_group({"params": layer.weight})
    with pytest.raises(NoWeightError, match=r"requires_grad_\(False\) keeps them"):
        layer.weight.requires_grad = False
    with pytest.raises((RuntimeError, TypeError)):
        nn.Parameter(layer.weight)
    with pytest.raises(TypeError, match="cannot assign"):
        other.weight = layer.weight
    with pytest.raises(NoWeightError):
        layer.weight = nn.Parameter(layer.dense_weight())
    assert "weight" not in dir(layer) and "weight" not in layer.state_dict()


def test_who_asks_for_its_gradient_is_told_whose_there_are():
    """Some ask without an error where a tensor is in no graph."""
    layer = frozen()
    for read in (layer.weight.square().sum(), layer(torch.arange(ROWS)).square().sum()):
        for ask in (
            lambda loss: torch.autograd.grad(loss, layer.weight, retain_graph=True),
            lambda loss: torch.autograd.grad(loss, inputs=[layer.weight], allow_unused=True),
            lambda loss: loss.backward(inputs=[layer.weight], retain_graph=True),
        ):
            with pytest.raises(NoWeightError, match="gradients, are table_parameters"):
                ask(read)
        gradients = torch.autograd.grad(read, layer.table_parameters(), retain_graph=True)
        assert all(bool(found.any()) for found in gradients if found.numel())
    layer.weight.square().sum().backward()
    torch.autograd.backward(layer.weight, torch.ones(ROWS, DIM))


def test_rows_may_be_written_into_other_tensors():
    layer = frozen().eval()
    with torch.no_grad():
        other = torch.zeros(ROWS, DIM).copy_(layer.weight)
        other[:] = layer.weight
    assert torch.equal(other, layer.dense_weight())
    assert torch.equal(copy.deepcopy(layer.weight.detach()), other)
    assert str(other) == str(layer.weight.detach())


def test_a_collection_shows_all_tables():
    counts = {"a": torch.arange(20), "b": torch.arange(30)}
    tables = amtl.AMTLEmbeddingCollection({"a": 20, "b": 30}, DIM, counts=counts, budget=0.3)
    tables.freeze()
    assert torch.equal(tables.weight.detach().clone(), tables.dense_weight())


def test_what_scales_rows_in_the_table_is_refused():
    layer = frozen(max_norm=1.0)
    before = layer.dense_weight()
    with pytest.raises(NoWeightError):
        layer.weight  # noqa: B018
    assert not hasattr(layer, "weight") and torch.equal(layer.dense_weight(), before)


class Scores(nn.Module):
    """Scores every row by the weight, in training, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(ROWS, DIM)

    def forward(self, rows):
        return self.table(rows) @ self.table.weight.T


def test_a_model_that_scores_by_the_weight_trains_once_it_is_frozen():
    losses = []
    for fused in (None, partial(optim.SGD, lr=0.5)):
        model = amtl.convert(Scores(), {"table": COUNTS}, budget=0.3, fused_optimizer=fused)
        rows, wanted = torch.arange(20), torch.arange(20).flip(0)
        with pytest.raises(RuntimeError, match="freeze"):
            model(rows)
        amtl.freeze(model)
        optimizer = torch.optim.SGD(amtl.table_parameters(model), lr=0.5) if not fused else None
        losses.append([])
        for _ in range(30):
            loss = F.cross_entropy(model(rows), wanted)
            loss.backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    for found in losses:
        assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("bits", [None, 8])
def test_compiled_and_traced_models_read_it(bits):
    model = amtl.freeze(amtl.convert(Scores(), {"table": COUNTS}, budget=0.3, bits=bits)).eval()
    rows = torch.arange(5)
    with torch.no_grad():
        expected = model(rows)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(rows), expected)
        exported = torch.export.export(model, (rows,), strict=False).module()
        assert torch.equal(exported(rows), expected)
        assert torch.equal(torch.jit.trace(model, (rows,))(rows), expected)


def test_what_goes_past_pytorchs_functions_is_refused():
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(NoWeightError, match="clone"):
        torch.add(frozen().weight, 1)
    assert isinstance(frozen().weight, ShownRows)
