"""The layers: drop-in signatures, arguments, gradients, state, compile, and a little training."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
import warnings

import amtl
import pytest
import torch
import torch._dynamo
import torch.fx
from amtl import AMTLEmbedding, AMTLEmbeddingBag, AMTLEmbeddingCollection, BudgetError
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KINDS = [AMTLEmbedding, AMTLEmbeddingBag]
ROWS, DIM = 120, 8


def counts_of(rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = (1000 / torch.arange(1, rows + 1).pow(1.1)).long()
    return counts[torch.randperm(rows, generator=generator)]


def layer_of(kind=AMTLEmbedding, **options):
    torch.manual_seed(0)
    options = {"budget": 0.4, "bits": None, "parametrization": "ordinal", **options}
    return kind(ROWS, DIM, **{"counts": counts_of(), **options})


def masked_weight(layer):
    columns = torch.arange(layer.embedding_dim)
    return torch.where(columns < layer.row_dims()[:, None], layer.weight, 0)


def test_by_default_sizes_follow_from_counts_and_nothing_is_learned():
    layer = AMTLEmbedding(ROWS, DIM, counts=counts_of(), budget=0.4, bits=None)
    assert layer.options.parametrization == "rule" and layer.mask_parameters() == []
    dims = layer.row_dims()
    by_count = dims[torch.argsort(counts_of(), stable=True)]
    assert bool((by_count.diff() >= 0).all()) and dims.min() < dims.max()
    rows = torch.arange(ROWS)
    assert torch.equal(layer(rows), layer.eval()(rows))
    assert 0.35 < layer.stored_fraction() <= 0.4


# Drop-in


@pytest.mark.parametrize(
    ("ours", "theirs"), [(AMTLEmbedding, nn.Embedding), (AMTLEmbeddingBag, nn.EmbeddingBag)]
)
def test_signatures_are_supersets(ours, theirs):
    # Whoever looks for embeddings would take the weight for what is shown.
    assert not issubclass(ours, theirs)
    for function in ("__init__", "forward", "from_pretrained"):
        expected = inspect.signature(getattr(theirs, function)).parameters
        actual = list(inspect.signature(getattr(ours, function)).parameters.values())
        for parameter, mine in zip(expected.values(), actual, strict=False):
            assert (mine.name, mine.default, mine.kind) == (
                parameter.name,
                parameter.default,
                parameter.kind,
            )


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0,), (0, 3)])
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_embedding_is_the_masked_lookup(shape, index_type):
    layer = layer_of().eval()
    rows = torch.randint(ROWS, shape, dtype=index_type)
    assert torch.equal(layer(rows), F.embedding(rows.long(), masked_weight(layer)))


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_bag_is_the_masked_bag(mode, include_last_offset):
    layer = layer_of(
        AMTLEmbeddingBag, mode=mode, include_last_offset=include_last_offset, padding_idx=3
    ).eval()
    rows = torch.randint(ROWS, (20,))
    rows[4] = 3
    offsets = torch.tensor([0, 4, 4, 13, 20])
    weights = torch.rand(20) if mode == "sum" else None
    dense = masked_weight(layer)
    expected = F.embedding_bag(
        rows,
        dense,
        offsets,
        mode=mode,
        per_sample_weights=weights,
        include_last_offset=include_last_offset,
        padding_idx=3,
    )
    torch.testing.assert_close(layer(rows, offsets, weights), expected)
    table = rows.reshape(4, 5)
    torch.testing.assert_close(
        layer_of(AMTLEmbeddingBag, mode=mode, padding_idx=3).eval()(table),
        F.embedding_bag(table, dense, mode=mode, padding_idx=3),
    )


def test_default_mode_is_mean():
    layer = layer_of(AMTLEmbeddingBag).eval()
    table = torch.randint(ROWS, (4, 5))
    torch.testing.assert_close(layer(table), F.embedding_bag(table, masked_weight(layer)))


def test_starts_like_nn_embedding():
    torch.manual_seed(0)
    theirs = nn.Embedding(ROWS, DIM, padding_idx=-2)
    ours = layer_of(padding_idx=-2)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.padding_idx == theirs.padding_idx == ROWS - 2
    assert not ours.weight[ROWS - 2].any()
    assert float(layer_of(weight_std=0.01).weight.detach().std()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained(kind):
    table = torch.randn(ROWS, DIM)
    frozen = kind.from_pretrained(table, counts=counts_of(), budget=0.5)
    assert not frozen.weight.requires_grad and torch.equal(frozen.weight, table)
    trainable = kind.from_pretrained(nn.Parameter(table), freeze=False, counts=counts_of())
    assert trainable.weight.requires_grad
    assert trainable.weight.data_ptr() == table.data_ptr()
    turned = kind.from_pretrained(table.T.contiguous().T, counts=counts_of())
    assert turned.weight.is_contiguous()
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        kind.from_pretrained(table[0], counts=counts_of())


@pytest.mark.parametrize("max_norm", [0.5, 2.0])
def test_max_norm_changes_the_table_as_nn_embedding_does(max_norm):
    layer = layer_of(max_norm=max_norm).eval()
    twin = nn.Embedding(ROWS, DIM, max_norm=max_norm, _weight=layer.weight.detach().clone())
    rows = torch.randint(ROWS, (6, 3))
    layer(rows)
    twin(rows)
    assert torch.equal(layer.weight, twin.weight)
    before = layer(rows)
    layer.freeze()
    torch.testing.assert_close(layer(rows), before)
    for block in layer.blocks:
        block.data.mul_(100)
    norms = layer(rows).norm(dim=-1)
    assert bool((norms <= max_norm * (1 + 1e-5)).all())


def test_max_norm_in_bags():
    layer = layer_of(AMTLEmbeddingBag, max_norm=0.1, mode="sum").eval()
    assert float(layer(torch.randint(ROWS, (6, 1))).detach().norm(dim=-1).max()) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["search", "frozen"])
def test_repr_names_what_matters(kind, phase):
    layer = layer_of(kind, padding_idx=1, max_norm=1.0, sparse=True, field_sizes=[20, 100])
    if phase == "frozen":
        layer.freeze()
    text = repr(layer)
    for part in (f"{ROWS}, {DIM}", "padding_idx=1", "max_norm", "sparse", phase, "fields=2"):
        assert part in text


# Bad arguments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": None}, r"torch\.bincount"),
        ({"counts": torch.ones(3)}, "shape"),
        ({"budget": 0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": None}, "needs a budget"),
        ({"parametrization": "best"}, "parametrization"),
        ({"min_dim": -1}, "min_dim"),
        ({"min_dim": 9}, "min_dim"),
        ({"granularity": 0}, "granularity"),
        ({"tier_width": 0}, "tier_width"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"final_temperature": -1}, "final_temperature"),
        ({"size_noise": -1}, "size_noise"),
        ({"learns_every": 0}, "learns_every"),
        ({"learns_every": 2.0}, "learns_every"),
        ({"noise_quantiles": 0}, "noise_quantiles"),
        ({"freeze_at": 1.1}, "freeze_at"),
        ({"init_exponent": -1}, "init_exponent"),
        ({"mask_hidden": (0,)}, "hidden"),
        ({"parametrization": "ordinal", "kernel_width": 0}, "kernel_width"),
        ({"weight_std": -1}, "weight_std"),
        ({"bounds_check": "maybe"}, "bounds_check"),
        ({"padding_idx": ROWS}, "padding_idx"),
        ({"field_sizes": [1, 2]}, "field_sizes"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"_weight": torch.zeros(2, 2)}, "_weight"),
    ],
)
def test_bad_arguments(kind, change, message):
    with pytest.raises(ValueError, match=message):
        layer_of(kind, **change)


def test_more_bad_arguments():
    with pytest.raises(ValueError, match="maximum"):
        layer_of(AMTLEmbeddingBag, mode="max")
    with pytest.raises(BudgetError, match="min_dim=6"):
        layer_of(min_dim=6)
    with pytest.raises(ValueError, match="embedding_dim"):
        AMTLEmbedding(3, 0, counts=torch.ones(3))
    with pytest.raises(TypeError, match="bugdet"):
        layer_of(bugdet=0.3)
    with pytest.raises(ValueError, match="progress"):
        layer_of().update_schedule(1.5)
    with pytest.raises(ValueError, match="sum"):
        layer_of(AMTLEmbeddingBag, mode="mean")(
            torch.zeros(2, 2, dtype=torch.int64), per_sample_weights=torch.ones(2, 2)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_index_errors(kind):
    layer = layer_of(kind)
    with pytest.raises(IndexError, match=f"index {ROWS} at position 1 .* {ROWS} rows"):
        layer(torch.tensor([[0, ROWS]]))
    layer.name = "users"
    for _ in range(2):
        with pytest.raises(IndexError, match=r"^table 'users': index -3 at position 0"):
            layer(torch.tensor([[-3]]))
        if layer.phase == "search":
            layer.freeze()


# Gradients


@pytest.mark.parametrize("parametrization", ["ordinal", "free", "rule"])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients(parametrization, sparse):
    layer = layer_of(parametrization=parametrization, sparse=sparse, size_noise=0.0)
    rows = torch.randint(ROWS, (50,))
    delta = torch.randn(50, DIM)
    layer(rows).backward(delta)
    assert layer.weight.grad.is_sparse == sparse
    dense = layer.weight.grad.to_dense()
    kept = torch.arange(DIM) < layer.row_dims()[:, None]
    expected = torch.zeros(ROWS, DIM).index_add(0, rows, delta) * kept
    torch.testing.assert_close(dense, expected)
    if parametrization == "rule":
        assert layer.mask_parameters() == []
        return
    # The mask gradient: delta * W over all columns, summed by group, through the soft mask.
    signal = torch.zeros(layer.head.num_groups, DIM).index_add(
        0, layer.row_group[rows].long(), delta * layer.weight.detach()[rows]
    )
    got = [p.grad.clone() for p in layer.mask_parameters()]
    wanted = torch.autograd.grad(layer.head().mask, layer.mask_parameters(), signal)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(bool(g.any()) for g in got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_types(kind, dtype):
    layer = layer_of(kind, dtype=dtype)
    rows = torch.randint(ROWS, (6, 2))
    out = layer(rows)
    assert out.dtype == layer.dtype == dtype
    out.sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in layer.mask_parameters())
    assert layer.dense_bytes() == ROWS * DIM * dtype.itemsize


def test_conversion_after_construction():
    layer = layer_of(tier_width=1)
    sizes = layer.row_dims()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.row_dims(), sizes)
    layer.freeze()
    layer.float()
    assert layer.dtype == torch.float32 and layer(torch.tensor([1])).dtype == torch.float32


# Noise and schedule


def test_noise_in_training_until_the_freeze_point():
    layer = layer_of(freeze_at=0.5)
    rows = torch.arange(ROWS)
    quiet = layer.eval()(rows)
    layer.train()
    first, second = layer(rows), layer(rows)
    assert not torch.equal(first, second) and not torch.equal(first, quiet)
    # Every row still shows a prefix of itself.
    kept = first != 0
    assert bool((kept[:, 1:] <= kept[:, :-1]).all())
    layer.update_schedule(0.49)
    assert not torch.equal(layer(rows), quiet)
    layer.update_schedule(0.5)
    assert torch.equal(layer(rows), quiet)


def test_paper_mode_has_no_noise_by_default():
    layer = layer_of(parametrization="free", budget=None)
    rows = torch.arange(ROWS)
    assert torch.equal(layer(rows), layer(rows))


def test_temperature_schedule():
    layer = layer_of(parametrization="free", temperature=4.0, final_temperature=0.25, freeze_at=0.5)
    for progress, expected in ((0.0, 4.0), (0.25, 1.0), (0.5, 0.25), (1.0, 0.25)):
        layer.update_schedule(progress)
        assert float(layer.head.temperature) == pytest.approx(expected)


def test_noise_resumes_exactly():
    layer = layer_of()
    rows = torch.arange(ROWS)
    layer.update_schedule(0.1)
    layer(rows)
    state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    expected = [layer(rows), layer(rows)]
    resumed = layer_of()
    resumed.load_state_dict(state)
    torch.set_rng_state(random)
    assert torch.equal(resumed(rows), expected[0]) and torch.equal(resumed(rows), expected[1])
    assert resumed.progress == 0.1
    outputs = []
    for layer in (layer_of(), layer_of(), layer_of(seed=1)):
        torch.manual_seed(3)
        outputs.append(layer(rows))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parametrization", ["ordinal", "free", "rule"])
def test_activation_checkpointing_recomputes_the_same(kind, reentrant, parametrization):
    layer = layer_of(kind, parametrization=parametrization, size_noise=0.5, shared_rows="rarest")
    rows = torch.randint(ROWS, (40, 3))
    scale = torch.ones((), requires_grad=True)

    def part(scale):
        return (layer(rows) * scale).square().sum()

    gradients = []
    for wrapped in (False, True):
        layer.zero_grad()
        torch.manual_seed(7)
        loss = checkpoint(part, scale, use_reentrant=reentrant) if wrapped else part(scale)
        # Another layer draws between forward and backward.
        layer_of()(rows)
        loss.backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) >= 1
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# State


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parametrization", ["ordinal", "free", "rule"])
@pytest.mark.parametrize("phase", ["search", "frozen", "absorbed"])
@pytest.mark.parametrize("fresh_phase", ["search", "frozen"])
def test_state_dict_round_trip(kind, parametrization, phase, fresh_phase):
    options = {"parametrization": parametrization, "padding_idx": 4, "field_sizes": [50, 70]}
    layer = layer_of(kind, **options).eval()
    with torch.no_grad():
        for parameter in layer.mask_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if phase != "search":
        layer.freeze()
    if phase == "absorbed":
        layer.absorb_order()
    rows = torch.randint(ROWS, (9, 3))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    # Counts come with the state, so a layer built with a placeholder can load it.
    fresh = layer_of(kind, **{**options, "counts": torch.zeros(ROWS)}).eval()
    if fresh_phase == "frozen":
        fresh.freeze()
    assert str(fresh.load_state_dict(state)) == "<All keys matched successfully>"
    assert fresh.phase == layer.phase
    assert torch.equal(fresh(rows), layer(rows))
    assert fresh.stored_bytes() == layer.stored_bytes()
    assert torch.equal(fresh.row_dims(), layer.row_dims())
    assert torch.equal(fresh.row_fields(), layer.row_fields())
    if phase != "search":
        layer.thaw()
        fresh.thaw()
        assert torch.equal(fresh(rows), layer(rows))
        layer.freeze()
        fresh.freeze()
        assert torch.equal(fresh(rows), layer(rows))


def test_state_dict_inside_a_model():
    model = nn.Sequential(layer_of(), nn.Linear(DIM, 1)).eval()
    rows = torch.randint(ROWS, (9,))
    other = nn.Sequential(layer_of(counts=torch.ones(ROWS)), nn.Linear(DIM, 1)).eval()
    for _ in range(2):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(rows), model(rows))
        if model[0].phase == "search":
            model[0].freeze()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(rows), model(rows))


def test_plain_embedding_state_loads():
    layer, plain = layer_of(), nn.Embedding(ROWS, DIM)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 2, 4, 8])
def test_plain_state_fills_the_tiers_of_a_frozen_layer(kind, bits):
    """As trainers load checkpoints that another library wrote."""
    layer = layer_of(kind, budget=0.3, bits=bits).freeze()
    shown, blocks = layer.dense_weight(), list(layer.blocks)
    with torch.no_grad():
        for block in blocks:
            block.normal_(std=3.0)
    state = {"weight": shown}
    assert layer.load_state_dict(state, strict=False).missing_keys == ["tier_ends"]
    assert layer.phase == "frozen" and list(state) == ["weight"]
    assert all(mine is before for mine, before in zip(layer.blocks, blocks, strict=True))
    torch.testing.assert_close(layer.dense_weight(), shown)
    with pytest.raises(RuntimeError, match=r"that of a plain nn\.Embedding: load it before amtl"):
        layer.load_state_dict(state)
    cut = int(layer.row_dims().min()) < DIM
    warned = pytest.warns(UserWarning, match="numbers beyond the width of their rows are left out")
    with warned if cut else contextlib.nullcontext():
        layer.load_state_dict({"weight": torch.ones(ROWS, DIM)}, strict=False)
    assert cut or bits is not None
    kept = layer.dense_weight() != 0
    assert torch.equal(kept, torch.arange(DIM) < layer.row_dims()[:, None])


def test_plain_state_that_does_not_fit():
    layer = layer_of(budget=0.3, bits=8).freeze()
    before = layer.dense_weight()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": torch.ones(ROWS + 1, DIM)}, strict=False)
    assert layer.phase == "frozen" and torch.equal(layer.dense_weight(), before)
    with pytest.raises(RuntimeError, match=r"holds codes only.*load it before freeze\(\)"):
        layer.to_integers().load_state_dict({"weight": before}, strict=False)


def test_state_that_does_not_fit_is_refused():
    frozen = layer_of().freeze()
    with pytest.raises(RuntimeError, match="do not fit a table"):
        AMTLEmbedding(ROWS + 1, DIM, counts=torch.ones(ROWS + 1), bits=None).load_state_dict(
            frozen.state_dict()
        )
    layer = layer_of()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(AMTLEmbedding(ROWS, DIM + 1, counts=counts_of()).state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_copies(kind, frozen):
    layer = layer_of(kind)
    rows = torch.randint(ROWS, (9, 3))
    layer(rows)
    if frozen:
        layer.freeze()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(0)
        out = twin(rows)
        assert not torch.equal(out, torch.zeros_like(out))
        torch.manual_seed(0)
        assert torch.equal(out, layer(rows))
        twin.table_parameters()[0].data.zero_()
        assert bool(layer.table_parameters()[0].any())


# torch.compile


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    layer = layer_of(kind, sparse=True, final_temperature=0.5)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for step in range(10):
        rows = torch.randint(ROWS, (9, 3))
        for each in (layer, twin):
            each.update_schedule(step / 40)
            each.zero_grad()
        for each in (compiled, twin):
            torch.manual_seed(step)
            each(rows).sum().backward()
        torch.testing.assert_close(
            layer.weight.grad.to_dense(), twin.weight.grad.to_dense(), rtol=0, atol=0
        )
        for a, b in zip(layer.mask_parameters(), twin.mask_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    # One graph for all seeds, temperatures and progress.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    layer.eval().freeze()
    twin.eval().freeze()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), twin(rows))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_as_most_call_it(bits, dynamic):
    """Without `fullgraph`, lookups are in the graph, whether dynamic shapes are allowed or not.

    In evaluation, for compiled step sizes follow in each step.
    """
    layer = layer_of(AMTLEmbedding, parametrization="rule", bits=bits, budget=0.3).freeze().eval()
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=dynamic):
        compiled = torch.compile(layer, backend="aot_eager")
        rows = torch.randint(ROWS, (9, 3))
        for each in (compiled, twin):
            each(rows).square().sum().backward()
    for mine, its in zip(layer.blocks, twin.blocks, strict=True):
        torch.testing.assert_close(mine.grad.to_dense(), its.grad.to_dense())
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


# Transformations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_cannot_work_says_why(kind, frozen):
    layer = layer_of(kind)
    rows = torch.randint(ROWS, (4, 3))
    if frozen:
        layer.freeze()
    else:
        with pytest.raises(RuntimeError, match=r"size noise.*eval\(\)"):
            torch.jit.trace(layer, (rows,))
    parameters = dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match=r"torch\.func.*Use autograd"):
        torch.func.grad(lambda p: functional_call(layer, p, (rows,)).sum())(parameters)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        dual = {n: forward_ad.make_dual(p.detach(), p.detach()) for n, p in parameters.items()}
        functional_call(layer, dual, (rows,))
    layer.eval()
    with pytest.raises(RuntimeError, match="without vmap"):
        torch.func.vmap(layer)(rows[:, None])
    with pytest.raises(RuntimeError, match=r"amtl\.revert"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (rows,), io.BytesIO(), dynamo=False)
    # The newer exporter needs onnxscript; it calls torch.export.
    exporter = {"__name__": "torch.onnx.newer", "export": torch.export.export}
    exec("def call(*args):\n    return export(*args)", exporter)
    with pytest.raises(RuntimeError, match=r"amtl\.revert"):
        exporter["call"](layer, (rows,))
    with pytest.raises(RuntimeError, match=r"nn\.Sequential"):
        torch.fx.symbolic_trace(layer)
    for module in (layer, nn.Sequential(layer)):
        with pytest.raises(RuntimeError, match=r"torch\.export.*amtl\.revert"):
            torch.jit.script(module)
    dense = amtl.revert(copy.deepcopy(layer), masked=True)
    torch.testing.assert_close(torch.jit.script(dense)(rows), layer(rows))
    with pytest.raises(ValueError, match="float64"):
        layer.double()(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traces_and_exports(kind, frozen):
    layer = layer_of(kind, shared_rows="rarest", budget=0.1).eval()
    rows, others = torch.randint(ROWS, (4, 3)), torch.randint(ROWS, (4, 3))
    layer(rows)
    if frozen:
        layer.freeze()
    traced = torch.jit.trace(layer, (rows,))
    exported = torch.export.export(layer, (rows,)).module()
    for program in (traced, exported):
        assert torch.equal(program(others), layer(others))
    assert torch.equal(copy.deepcopy(layer)(others), layer(others))


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_model_holds_the_layer_through_its_phases(kind):
    model = nn.Sequential(nn.Sequential(layer_of(kind)), nn.Linear(DIM, 1))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    assert traced.get_submodule("0.0") is model[0][0]
    rows = torch.randint(ROWS, (4, 3))
    for _ in range(2):
        found = []
        for each in (traced, model):
            torch.manual_seed(1)
            each(rows).sum().backward()
            found.append([p.grad.clone() for p in each.parameters()])
            each.zero_grad()
        assert len(found[0]) == len(found[1])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        if model[0][0].phase == "search":
            amtl.freeze(traced)
    revived = torch.fx.symbolic_trace(model.eval())
    assert torch.equal(revived(rows), model(rows))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = layer_of(AMTLEmbeddingBag, mode="sum").eval()

    def forward(self, rows, offsets, weights):
        return self.table(rows, offsets, per_sample_weights=weights * 2)


def test_a_traced_model_hands_bags_over():
    model = Bags()
    arguments = torch.randint(ROWS, (7,)), torch.tensor([0, 2, 2]), torch.rand(7)
    assert torch.equal(torch.fx.symbolic_trace(model)(*arguments), model(*arguments))


# Fields and accounting


def test_fields_share_one_budget():
    counts = torch.cat([counts_of(100), torch.full((20,), 5000)])
    layer = AMTLEmbedding(120, 16, counts=counts, field_sizes=[100, 20], budget=0.25, bits=None)
    assert layer.field_offsets == [0, 100]
    assert layer.row_fields().tolist() == [0] * 100 + [1] * 20
    dims = layer.row_dims()
    assert dims.dtype == torch.int32
    assert int(dims[100:].min()) > float(dims[:100].float().mean())
    assert layer.stored_fraction() <= 0.25
    assert layer.group_dims().shape == (layer.head.num_groups,)
    assert torch.equal(layer.group_dims()[layer.row_group], dims)


def test_row_features_tell_rows_of_one_count_apart():
    torch.manual_seed(0)
    useful = torch.arange(ROWS) % 2
    layer = AMTLEmbedding(
        ROWS,
        DIM,
        counts=torch.ones(ROWS),
        row_features=useful[:, None],
        budget=0.5,
        parametrization="ordinal",
    )
    assert layer.head.num_groups == ROWS
    optimizer = torch.optim.Adam(layer.mask_parameters(), lr=1e-2)
    for _ in range(20):
        # Longer rows help where the feature says so.
        loss = -(layer(torch.arange(ROWS)) * layer.weight.detach() * useful[:, None]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dims = layer.row_dims().float()
    assert dims[useful == 1].min() > dims[useful == 0].max()
    rows = torch.arange(ROWS)
    before = layer.eval()(rows)
    fresh = AMTLEmbedding(
        ROWS,
        DIM,
        counts=torch.ones(ROWS),
        row_features=torch.zeros(ROWS, 1),
        budget=0.5,
        parametrization="ordinal",
    )
    fresh.load_state_dict(layer.freeze().state_dict())
    assert torch.equal(fresh.eval()(rows), before)


def test_bytes():
    layer = layer_of(tier_width=1)
    assert layer.dense_bytes() == ROWS * DIM * 4
    assert layer.stored_bytes() == int(layer.row_dims().sum()) * 4
    assert layer.stored_fraction() == layer.stored_bytes() / layer.dense_bytes()


# Training


@pytest.mark.parametrize("parametrization", ["ordinal", "rule"])
def test_training_in_full(parametrization):
    """Search, freeze, go on: loss falls, frequent values end up wider, the budget holds."""
    torch.manual_seed(0)
    rows, dim, budget = 400, 16, 0.2
    popularity = 1 / torch.arange(1, rows + 1).float().pow(1.1)
    target = torch.randn(rows, dim)
    sample = torch.multinomial(popularity, 20000, replacement=True)
    counts = torch.bincount(sample, minlength=rows)
    model = nn.Sequential(
        AMTLEmbedding(
            rows,
            dim,
            counts=counts,
            budget=budget,
            bits=None,
            parametrization=parametrization,
            weight_std=0.1,
        ),
        nn.Linear(dim, dim),
    )
    layer = model[0]
    optimizer = torch.optim.Adam(
        [
            {"params": [*layer.table_parameters(), *model[1].parameters()], "lr": 2e-2},
            {"params": layer.mask_parameters(), "lr": 1e-2},
        ]
    )
    batches = sample.split(500)
    losses = []
    for step, batch in enumerate(batches * 3):
        progress = step / (3 * len(batches))
        layer.update_schedule(progress)
        if progress >= layer.freeze_at and layer.phase == "search":
            layer.freeze(optimizer)
        loss = (model(batch) - target[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert layer.stored_fraction() <= budget
    dims = layer.row_dims().float()
    assert dims[:20].mean() > 2 * dims[-100:].mean()
    assert len(layer.blocks) > 3


@pytest.mark.parametrize("kind", ["embedding", "bag", "collection"])
@pytest.mark.parametrize("phase", ["search", "frozen"])
def test_what_are_no_row_numbers_is_said(kind, phase):
    counts = torch.arange(20).flip(0).roll(3)
    if kind == "collection":
        layer = AMTLEmbeddingCollection([20], 8, counts=[counts])
    else:
        kinds = {"embedding": AMTLEmbedding, "bag": AMTLEmbeddingBag}
        layer = kinds[kind](20, 8, counts=counts, shared_rows="rarest")
    if phase == "frozen":
        layer.freeze()
    for wrong in (None, "rows", [1, 2], 3):
        with pytest.raises(TypeError, match="input must be a tensor of int32 or int64"):
            layer(wrong)
    with pytest.raises(ValueError, match="input must be int32 or int64, got"):
        layer(torch.ones(2, 1))


@pytest.mark.parametrize("frozen", [False, True])
def test_nested_tensors_are_looked_up_as_nn_embedding_does(frozen):
    plain = nn.Embedding(ROWS, DIM)
    layer = AMTLEmbedding.from_pretrained(
        plain.weight.detach().clone(), freeze=False, counts=counts_of(), budget=1.0, bits=None
    )
    if frozen:
        layer.freeze()
    parts = [torch.tensor([1, 5]), torch.tensor([2]), torch.tensor([3, 3, 0])]
    rows = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for train in (True, False):
        expected, found = plain.train(train)(rows), layer.train(train)(rows)
        assert found.shape == expected.shape
        torch.testing.assert_close((found + expected).values(), 2 * expected.values())
    layer(rows).values().square().sum().backward()
    assert sum(int(p.grad.count_nonzero()) for p in layer.parameters()) == 5 * DIM
    with amtl.counting(nn.Sequential(plain)) as counts:
        plain(rows)
    assert counts["0"].sum() == 6 and counts["0"][3] == 2
    with torch.no_grad(), pytest.raises(IndexError, match=f"index {ROWS}"):
        layer.eval()(torch.nested.nested_tensor([torch.tensor([ROWS])], layout=torch.jagged))
