"""Row updates equal their dense namesakes on touched values and leave the others alone."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import applying, in_order, states
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import fused, optim, reference

N, D = 60, 17
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "sgd": (optim.SGD, torch.optim.SGD),
    "adagrad": (optim.Adagrad, torch.optim.Adagrad),
    "rowwise_adagrad": (optim.RowwiseAdagrad, None),
    "adam": (optim.Adam, torch.optim.Adam),
}


def loss(table: Tensor, indices: Tensor, sizes: Tensor, target: Tensor, **options: Any) -> Tensor:
    return (ak.masked_embedding(table, indices, sizes, **options) * target).sum()


def train(optimizer: Any, table: Tensor, steps: list[tuple[Tensor, Tensor]], sizes: Tensor) -> None:
    for indices, target in steps:
        optimizer.zero_grad()
        loss(table, indices, sizes, target).backward()
        optimizer.step()


def random_steps(count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, N, (40,), generator=g).to(device),
            torch.randn(40, D, generator=g).to(device),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_equal_to_the_dense_optimizer(backend: Any, name: str, weight_decay: float) -> None:
    """Every row is touched in every step, so that the dense optimizer does nothing else."""
    sparse, dense = OPTIMIZERS[name]
    start = torch.randn(N, D, device=backend.device)
    sizes = torch.full((N,), D, dtype=torch.int32, device=backend.device)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    options = {"lr": 0.1, "weight_decay": weight_decay}
    a, b = sparse([ours], **options), (dense or sparse)([theirs], **options)
    rows = torch.arange(N, device=backend.device)
    for _ in range(4):
        target = torch.randn(N, D, device=backend.device)
        for table, optimizer, is_sparse in ((ours, a, True), (theirs, b, False)):
            optimizer.zero_grad()
            loss(table, rows, sizes, target, sparse=is_sparse).backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 17, 64, 130])
def test_update_agrees_with_the_reference(
    backend: Any, name: str, dtype: torch.dtype, dim: int
) -> None:
    g = torch.Generator().manual_seed(1)
    rows = torch.randperm(N, generator=g)[:20].sort().values
    sizes = torch.randint(0, dim + 1, (20,), generator=g)
    grads = torch.randn(20, dim, generator=g) * (torch.arange(dim) < sizes[:, None])
    grads[3, 0] = 0.0
    weight = torch.randn(N, dim, generator=g).to(dtype)
    state = states(name, [weight], partial(torch.rand, generator=g))
    hyper = [0.1, 1e-8, 0.01, 0.9, 0.99, 3.0]
    results = []
    for function, device in (
        (torch.ops.amtl.apply_, backend.device),
        (reference.IMPLEMENTATIONS["apply_"], "cpu"),
    ):
        w, s = weight.clone().to(device), [moment.clone().to(device) for moment in state]
        given = [rows.to(device)], [grads.to(dtype).to(device)]
        function(*in_order("apply_", applying([w], *given, name, hyper, s)))
        results.append([t.cpu() for t in (w, *s)])
    for got, want in zip(*results, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[got.dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance / 10)

    # Untouched rows and everything past the last non-zero gradient are the same bits as before.
    last = ak.reference.kept_prefix(grads.to(dtype))
    touched = torch.zeros(N, dim, dtype=torch.bool)
    touched[rows] = last
    assert torch.equal(results[0][0][~touched], weight[~touched])
    for moment, got in zip(state, results[0][1:], strict=True):
        keep = ~touched if moment.dim() == 2 else ~touched.any(1)
        assert torch.equal(got[keep], moment[keep])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", ["in the prefix", "past the prefix"])
def test_nan_stays_where_it_is(backend: Any, name: str, where: str) -> None:
    """One in the prefix's gradient leaves the rest of the row alone, one past it the prefix."""
    device = backend.device
    weight, grads = torch.ones(N, D), torch.ones(2, D)
    grads[:, 5:] = 0
    if where == "in the prefix":
        grads[0, 2] = float("nan")
    else:
        weight[4, 5:] = float("nan")
    # Zeros, and no eps: a division of zero by zero must not reach what is not kept.
    state = states(name, [weight], partial(torch.zeros, device=device))
    now, rows = weight.clone().to(device), torch.tensor([4, 9], device=device)
    hyper = [0.1, 0.0, 0.01, 0.9, 0.99, 1.0]
    arguments = applying([now], [rows], [grads.to(device)], name, hyper, state)
    torch.ops.amtl.apply_(*in_order("apply_", arguments))
    now = now.cpu()
    torch.testing.assert_close(now[:, 5:], weight[:, 5:], rtol=0, atol=0, equal_nan=True)
    assert now[9].isfinite().all() and (now[9, :5] != 1).all()
    spoilt = now[4, :5].isnan()
    if where == "past the prefix":
        assert not spoilt.any() and (now[4, :5] != 1).all()
    else:
        assert spoilt[2] and spoilt.all() == (name == "rowwise_adagrad")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_accumulate(name: str) -> None:
    sizes = torch.randint(1, D + 1, (N,), dtype=torch.int32)
    (i, x), (j, y) = random_steps(2, "cpu")
    start = torch.randn(N, D)
    once, twice = start.clone().requires_grad_(), start.clone().requires_grad_()
    loss(once, torch.cat([i, j]), sizes, torch.cat([x, y])).backward()
    loss(twice, i, sizes, x).backward()
    loss(twice, j, sizes, y).backward()
    for table in (once, twice):
        OPTIMIZERS[name][0]([table], lr=0.1).step()
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_one_row_are_summed(dtype: torch.dtype) -> None:
    """As `nn.Embedding(sparse=True)` leaves them: a row for each lookup, in the order of these."""
    rows, values = torch.randint(0, N, (900,)), torch.randn(900, D).to(dtype)
    gradient = torch.sparse_coo_tensor(rows[None], values, (N, D), check_invariants=False)
    found, sums = optim.rows_and_grads(gradient)
    assert torch.equal(found, rows.unique())
    exact = torch.zeros(N, D, dtype=torch.float64).index_add_(0, rows, values.double())[found]
    assert sums.dtype == dtype
    # Rounded once, however many there are.
    error = {"rtol": torch.finfo(dtype).eps, "atol": 2e-5 if dtype == torch.float32 else 1e-3}
    if dtype == torch.float64:
        error = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(sums.double(), exact, **error)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_round_trip(name: str) -> None:
    sizes = torch.randint(1, D + 1, (N,), dtype=torch.int32)
    steps = random_steps(6, "cpu")
    start = torch.randn(N, D).half()
    straight, resumed = start.clone().requires_grad_(), start.clone().requires_grad_()
    make = OPTIMIZERS[name][0]
    half = [(i, x.half()) for i, x in steps]
    train(make([straight], lr=0.1), straight, half, sizes)
    first = make([resumed], lr=0.1)
    train(first, resumed, half[:3], sizes)
    second = make([resumed], lr=0.1)
    second.load_state_dict(first.state_dict())
    train(second, resumed, half[3:], sizes)
    assert torch.equal(straight, resumed)


def test_dense_parameters_in_the_same_group() -> None:
    table, bias = torch.randn(N, D, requires_grad=True), torch.randn(D, requires_grad=True)
    sizes = torch.full((N,), D, dtype=torch.int32)
    for make, _ in OPTIMIZERS.values():
        optimizer = make([table, bias], lr=0.1)
        out = ak.masked_embedding(table, torch.arange(5), sizes) + bias
        out.square().sum().backward()
        before = bias.detach().clone()
        assert optimizer.step() is None
        assert not torch.equal(before, bias)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tables_of_one_type_and_step_are_updated_in_one_call(backend: Any, name: str) -> None:
    """In groups of equal hyperparameters too, and with the bits of an optimizer for each table."""
    kinds = {
        "late": ([N, 7], torch.float32, 0.1),
        "narrow": ([N, D], torch.float32, 0.1),
        "untouched": ([N, D], torch.float32, 0.1),
        "half": ([N, 3], torch.bfloat16, 0.1),
        "wide": ([N, 64], torch.float32, 0.1),
        "empty": ([7, 0], torch.float32, 0.1),
        "same": ([9, 5], torch.float32, 0.1),
        "other": ([N, D], torch.float32, 0.2),
    }
    g = torch.Generator().manual_seed(2)
    start = {k: torch.randn(*shape, generator=g).to(t) for k, (shape, t, _) in kinds.items()}
    rows = {k: [4, 2, 4] if k == "same" else [1, 5] for k in kinds}
    grads = {
        k: torch.sparse_coo_tensor(
            [rows[k]],
            torch.randn(len(rows[k]), w.shape[1], generator=g).to(w),
            w.shape,
            check_invariants=True,
        )
        for k, w in start.items()
    }
    start, grads = ({k: x.to(backend.device) for k, x in each.items()} for each in (start, grads))
    together, alone = ({k: w.clone() for k, w in start.items()} for _ in range(2))
    make = OPTIMIZERS[name][0]
    first = [k for k in kinds if k not in ("same", "other")]
    groups = [
        {"params": [together[k] for k in names], "lr": kinds[names[0]][2]}
        for names in (first, ["same"], ["other"])
    ]
    both = [make(groups)], [make([alone[k]], lr=kinds[k][2]) for k in kinds]
    for step in range(3):
        for tables, optimizers in zip((together, alone), both, strict=True):
            for k, table in tables.items():
                table.grad = grads[k] if k != "untouched" and (k != "late" or step) else None
            with torch.profiler.profile() as profile:
                for optimizer in optimizers:
                    optimizer.step()
            if tables is together:
                calls = sum(e.name == "amtl::apply_" for e in profile.events())
                assert calls == 3 + (name == "adam" and step > 0)
    for k in kinds:
        assert torch.equal(together[k], alone[k])
        assert torch.equal(together[k], start[k]) == (k in ("empty", "untouched"))


def test_clip_grad_norm() -> None:
    table, dense = torch.randn(N, D, requires_grad=True), torch.randn(3, requires_grad=True)
    sizes = torch.randint(1, D + 1, (N,), dtype=torch.int32)
    for i, x in random_steps(2, "cpu"):
        (loss(table, i, sizes, x) + dense.square().sum()).backward()
    plain = torch.cat([table.grad.to_dense().flatten(), dense.grad])
    norm = optim.clip_grad_norm_([table, dense], 1.0)
    torch.testing.assert_close(norm, plain.norm())
    clipped = torch.cat([table.grad.to_dense().flatten(), dense.grad])
    torch.testing.assert_close(clipped, plain / plain.norm(), rtol=1e-4, atol=1e-6)
    assert torch.equal(optim.clip_grad_norm_([], 1.0), torch.zeros(()))
    with pytest.raises(ValueError, match="max_norm"):
        optim.clip_grad_norm_([table], 0.0)


@pytest.mark.parametrize("bad", [[3, 3], [N - 1, N], [-1, 2]])
def test_rows_must_ascend(bad: list[int]) -> None:
    """In every block, before any of them changes."""
    blocks = [torch.zeros(N, D), torch.zeros(N, 2)]
    rows = [torch.tensor([1, 2]), torch.tensor(bad)]
    grads = [torch.ones(2, D), torch.ones(2, 2)]
    arguments = in_order("apply_", applying(blocks, rows, grads, "sgd"))
    with pytest.raises(ValueError, match="strictly ascending"):
        torch.ops.amtl.apply_(*arguments)
    assert not any(block.any() for block in blocks)
    rows[1] = torch.tensor([2, 3])
    torch.ops.amtl.apply_(*arguments)
    assert all(block.any() for block in blocks)


ROUNDING = [n for n in ("reference", "hostsim") if n in ak.build_info()["backends"]]  # type: ignore[operator]
ROUNDING += ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
"""Backends without a GPU that round stochastically."""


@pytest.mark.every(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("where", ROUNDING)
def test_stochastic_rounding(where: str, is_fused: bool, name: str) -> None:
    """Steps of a sixteenth of a unit move the mean by as much, and repeat bit for bit.

    n weights after s steps have a mean with a standard error below ``eps / 2 sqrt(s / n)``.
    """
    # The interpreter takes its time.
    steps, eps = 12 if where == "triton" else 60, torch.finfo(torch.bfloat16).eps
    options = {"lr": eps / 16, "stochastic_rounding": True}
    if "adagrad" in name:
        # The state stays where it starts, so that every step is one of lr.
        options |= {"initial_accumulator_value": 1e6, "lr": eps / 16 * 1e3}
    indices = torch.arange(N)
    sizes = torch.full((N,), D, dtype=torch.int32)
    results = []
    with ak.use_backend(where):
        for _ in range(2):
            table = torch.ones(N, D, dtype=torch.bfloat16, requires_grad=True)
            optimizer = OPTIMIZERS[name][0]([table], **options)
            for _ in range(steps):
                optimizer.zero_grad()
                if is_fused:
                    out = fused.masked_embedding(table, indices, sizes, optimizer=optimizer)
                else:
                    out = ak.masked_embedding(table, indices, sizes)
                out.sum().backward()
                optimizer.step()
            results.append(table.detach())
            assert int(optimizer.state[table]["step"]) == steps
    assert torch.equal(*results)
    error = eps / 2 * (steps / (N * D)) ** 0.5
    assert abs(results[0].double().mean() - (1 - steps * eps / 16)) < 5 * error


def test_dense_parameters_are_rounded_stochastically_too() -> None:
    for make, _ in OPTIMIZERS.values():
        bias = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
        bias.grad = torch.ones_like(bias)
        rate = torch.finfo(torch.bfloat16).eps / 8
        make([bias], lr=rate, stochastic_rounding=True).step()
        assert bias.unique().numel() == 2
        assert abs(1 - bias.double().mean() - rate) < rate / 3


def test_the_cpu_kernels_refuse_to_round_stochastically() -> None:
    table = torch.ones(N, D, dtype=torch.bfloat16, requires_grad=True)
    optimizer = optim.SGD([table], stochastic_rounding=True)
    indices, sizes = torch.arange(N), torch.full((N,), D, dtype=torch.int32)
    ak.masked_embedding(table, indices, sizes).sum().backward()
    with pytest.raises(ValueError, match=r"set_backend\(.reference.\)"):
        optimizer.step()
    out = fused.masked_embedding(table, indices, sizes, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"set_backend\(.reference.\)"):
        out.sum().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("where", ["auto", *ROUNDING])
def test_steps_counted_on_the_device(where: str, is_fused: bool, name: str) -> None:
    """``capturable`` changes where the steps are counted, not what they do."""
    sizes = torch.full((N,), D, dtype=torch.int32)
    results = []
    with ak.use_backend(where):
        for capturable in (False, True):
            table = torch.linspace(-1, 1, N * D).reshape(N, D).requires_grad_()
            bias = torch.ones(D, requires_grad=True)
            optimizer = OPTIMIZERS[name][0]([table, bias], lr=0.1, capturable=capturable)
            for indices, target in random_steps(4, "cpu"):
                optimizer.zero_grad()
                if is_fused:
                    out = fused.masked_embedding(table, indices, sizes, optimizer=optimizer)
                else:
                    out = ak.masked_embedding(table, indices, sizes)
                ((out + bias) * target).sum().backward()
                optimizer.step()
            results.append((table.detach(), bias.detach()))
    for counted, plain in zip(*results, strict=True):
        torch.testing.assert_close(counted, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_the_step_counter_survives_a_round_trip(capturable: bool) -> None:
    table = torch.ones(N, D, requires_grad=True)
    first = optim.Adam([table], capturable=not capturable)
    train(first, table, random_steps(3, "cpu"), torch.full((N,), D, dtype=torch.int32))
    saved = first.state_dict()
    saved["param_groups"][0]["capturable"] = capturable
    second = optim.Adam([table], capturable=capturable)
    second.load_state_dict(saved)
    step = second.state[table]["step"]
    assert step.dtype == (torch.int64 if capturable else torch.float32) and int(step) == 3
    # A state that knows nothing of these options, as older versions saved it.
    del saved["param_groups"][0]["capturable"], saved["param_groups"][0]["stochastic_rounding"]
    second.load_state_dict(saved)
    assert not second.param_groups[0]["capturable"]


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}]
)
def test_bad_hyperparameters(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).rstrip("s")):
        optim.Adam([torch.zeros(2, 2)], **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_fused", [False, True])
def test_decay_of_all_rows(backend: Any, name: str, is_fused: bool) -> None:
    """Every K updates all values shrink by what K steps of the dense formula take off."""
    make, every, lr, decay = OPTIMIZERS[name][0], 3, 0.1, 0.02
    sizes = torch.full((N,), D, dtype=torch.int32, device=backend.device)
    start = torch.randn(N, D, device=backend.device)
    tables = [start.clone().requires_grad_() for _ in range(2)]
    decayed = make([tables[0]], lr=lr, weight_decay=decay, decay_every=every)
    plain = make([tables[1]], lr=lr)
    seen = N - 10
    for count, (indices, target) in enumerate(random_steps(8, backend.device)):
        if count and count % every == 0:
            state = plain.state[tables[1]]
            if name == "adam":
                root = (state["exp_avg_sq"] / (1 - 0.999**count)).sqrt() + 1e-8
            elif name == "sgd":
                root = torch.ones(N, 1, device=backend.device)
            else:
                root = state["sum"].reshape(N, -1).sqrt() + 1e-10
            with torch.no_grad():
                tables[1] *= (1 - every * lr * decay / root).clamp(min=0)
        for table, optimizer in zip(tables, (decayed, plain), strict=True):
            optimizer.zero_grad()
            if is_fused:
                # Nobody has to call step().
                out = fused.masked_embedding(table, indices % seen, sizes, optimizer=optimizer)
                (out * target).sum().backward()
            else:
                loss(table, indices % seen, sizes, target, sparse=True).backward()
                optimizer.step()
        torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=1e-7)
    unseen = tables[0].detach()[seen:]
    if name == "sgd":
        torch.testing.assert_close(unseen, start[seen:] * (1 - every * lr * decay) ** 2)
    else:
        # Their denominator is next to nothing: rows that nothing holds against decay are gone.
        assert not unseen.any()


@pytest.mark.parametrize("shape", [(), (7,), (200, 5), (70_000,), (6, 3, 2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_of_dense_parameters_a_part_at_a_time(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(at_once: int) -> Tensor:
        monkeypatch.setattr(optim, "_AT_ONCE", at_once)
        g = torch.Generator().manual_seed(3)
        value = torch.randn(shape, generator=g).requires_grad_()
        optimizer = OPTIMIZERS[name][0]([value], lr=0.1, weight_decay=0.1, decay_every=2)
        for _ in range(5):
            value.grad = torch.randn(shape, generator=g)
            optimizer.step()
        return value.detach()

    whole = trained(1 << 30)
    torch.testing.assert_close(trained(16), whole, rtol=0, atol=0)
    g = torch.Generator().manual_seed(3)
    value = torch.randn(shape, generator=g).requires_grad_()
    optimizer = OPTIMIZERS[name][0]([value], lr=0.1)
    for _ in range(5):
        value.grad = torch.randn(shape, generator=g)
        optimizer.step()
    assert (whole.abs() <= value.abs()).any() and not torch.equal(whole, value)


def test_decay_goes_on_where_a_state_was_saved() -> None:
    steps = random_steps(8, "cpu")
    sizes = torch.full((N,), D, dtype=torch.int32)
    start = torch.randn(N, D)
    whole, parts = start.clone().requires_grad_(), start.clone().requires_grad_()
    options = {"lr": 0.1, "weight_decay": 0.02, "decay_every": 3}
    train(optim.Adam([whole], **options), whole, steps, sizes)
    first = optim.Adam([parts], **options)
    train(first, parts, steps[:4], sizes)
    second = optim.Adam([parts], lr=1.0)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    train(second, parts, steps[4:], sizes)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    # What was saved before there was decay of all rows has none.
    state = first.state_dict()
    for group in state["param_groups"]:
        del group["decay_every"]
    second.load_state_dict(state)
    assert second.param_groups[0]["decay_every"] == 0


def test_what_decay_of_all_rows_does_not_go_with() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="does not go with capturable"):
        optim.Adam([weight], decay_every=2, capturable=True)
    with pytest.raises(ValueError, match="decay_every must not be negative"):
        optim.SGD([weight], decay_every=-1)
    codes = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    optimizer = optim.SGD([codes], weight_decay=0.1, decay_every=1)
    with pytest.raises(ValueError, match="tables of codes, which have no masters"):
        optimizer.fused_update([codes])
    # What is not updated is not decayed.
    still = torch.ones(3, 2, requires_grad=True)
    optimizer = optim.SGD([still], weight_decay=0.1, decay_every=1)
    for _ in range(3):
        optimizer.step()
    assert bool((still == 1).all())


def test_decay_keeps_small_steps_of_16_bits_where_they_are_rounded_stochastically() -> None:
    weight = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
    optimizer = optim.SGD(
        [weight], lr=1e-4, weight_decay=1.0, decay_every=1, stochastic_rounding=True
    )
    for _ in range(101):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx((1 - 1e-4) ** 100, abs=1e-3)


def test_tables_are_found_where_they_are_now() -> None:
    """Where they lay before is a hint only."""
    tables = [torch.nn.Parameter(torch.zeros(2, n)) for n in (1, 2, 3, 4)]
    optimizer = optim.SGD([{"params": tables[:2]}, {"params": tables[2:]}], lr=0.1)
    for _ in range(2):
        assert optimizer.check_owns(tables[2:]) is optimizer.param_groups[1]
        assert optimizer.check_owns(tables[:2]) is optimizer.param_groups[0]
    optimizer.param_groups.reverse()
    assert optimizer.check_owns(tables[2:]) is optimizer.param_groups[0]
    optimizer.param_groups[0]["params"].reverse()
    assert optimizer.check_owns(tables[2:]) is optimizer.param_groups[0]
    optimizer.param_groups[0]["params"] = tables[2:3]
    with pytest.raises(ValueError, match="must be in one group"):
        optimizer.check_owns(tables[2:])
    assert optimizer.check_owns(tables[2:3]) is optimizer.param_groups[0]
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.check_owns(again.param_groups[1]["params"]) is again.param_groups[1]


def test_no_class_is_called_as_one_of_torch():
    """Tools that look optimizers up by name find each once, whatever was imported before."""

    def below(kind):
        return {kind, *(each for direct in kind.__subclasses__() for each in below(direct))}

    kinds = below(torch.optim.Optimizer)
    ours = {kind for kind in kinds if kind.__module__ == "amtl_kernels.optim"}
    others = {kind.__name__.lower() for kind in kinds - ours}
    assert {"adam", "adagrad", "sgd"} <= others
    assert len(ours) >= 5 and not others & {kind.__name__.lower() for kind in ours}
    made = optim.Adam([torch.zeros(3, requires_grad=True)], lr=0.1)
    assert type(pickle.loads(pickle.dumps(made))) is optim.Adam
