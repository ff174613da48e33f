"""Size heads: the budget, the gradients, the paper's equations, the rule and the noise."""

from __future__ import annotations

import math
import re
import time

import pytest
import torch
from amtl import AMTLEmbedding
from amtl.layer.budget import BudgetError, SizeGrid, default_tier_width, fit_shift, fit_tilt
from amtl.layer.frequency import frequency_groups
from amtl.layer.laws import CapacityLaw
from amtl.layer.sizes import FreeSizes, OrdinalSizes, TwinBranches, make_size_head, perceptron
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import amtl_kernels

BITS = 4.0


def randomise(head, scale=1.0, seed=0):
    """Parameters away from their start, where the output layers are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return head


def to_double(head):
    for module in head.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.double()))
    for name in ("features", "gate", "start", "log_columns", "relative_sizes", "temperature"):
        if name in head._buffers:
            setattr(head, name, getattr(head, name).double())
    return head


def zipf_counts(rows, seed=0, top=5000):
    rank = torch.arange(1, rows + 1).double()
    generator = torch.Generator().manual_seed(seed)
    noise = 0.5 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return (top / rank.pow(1.05) * noise).long()


# The grid


@given(st.integers(1, 130), st.data())
@settings(max_examples=100)
def test_grid(dim, data):
    grid = SizeGrid(
        dim,
        data.draw(st.integers(0, dim), label="min"),
        *(data.draw(st.integers(1, dim), label=n) for n in ("granularity", "width")),
    )
    sizes = grid.sizes
    assert sizes[-1] == dim and list(sizes) == sorted(set(sizes)) and sizes[0] >= grid.min_dim
    assert all(s % grid.granularity == 0 for s in sizes[:-1])
    for size, stored in zip(sizes, grid.stored, strict=True):
        assert size <= stored < size + grid.tier_width
        assert stored % grid.tier_width == 0 or stored == dim
    for column, level in enumerate(grid.column_levels, start=1):
        assert sizes[level] >= column and (level == 0 or sizes[level - 1] < column)
    assert grid.stored_width(0) == 0
    if grid.granularity == 1 and grid.min_dim <= 1:
        assert grid.column_midpoints == tuple(j - 0.5 for j in range(1, dim + 1))


@pytest.mark.parametrize("field", ["min_dim", "granularity", "tier_width"])
@pytest.mark.parametrize("value", [0, 9, -1, 1.5, True])
def test_grid_refuses(field, value):
    if field == "min_dim" and value == 0:
        assert SizeGrid(8).sizes[0] == 0
        return
    with pytest.raises(ValueError, match=field):
        SizeGrid(8, **{field: value})


def test_tier_width_default():
    assert default_tier_width(64, 0.4, 4) == 4
    assert default_tier_width(64, 0.4, 2) == 4
    assert default_tier_width(64, 0.9, 2) == 8
    assert default_tier_width(16, 0.125, 4) == 1
    assert default_tier_width(16, None, 4) == 4
    assert default_tier_width(1, 0.1, 4) == 1


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), True])
def test_budget_out_of_range(budget):
    with pytest.raises(ValueError, match="budget must be"):
        make_size_head("rule", frequency_groups(torch.arange(5)), SizeGrid(8), budget)


def test_unreachable_budget_says_what_to_change():
    groups = frequency_groups(torch.arange(50))
    with pytest.raises(BudgetError, match=r"at least 0.5.*lower min_dim.* at most 3"):
        make_size_head("ordinal", groups, SizeGrid(8, min_dim=4), 0.4)
    with pytest.raises(BudgetError, match="tier_width=4"):
        FreeSizes(groups, SizeGrid(8, 1, tier_width=4), 0.4)
    with pytest.raises(BudgetError, match="set min_dim=0"):
        make_size_head("rule", groups, SizeGrid(8, 1), 0.1)
    assert make_size_head("rule", groups, SizeGrid(8), 0.1).stored_fraction() <= 0.1


# The budget


def stored_if(head, scores, shift):
    """Stored weights by the definition, in plain Python floats."""
    total = 0.0
    grid = head.grid
    for score, rows in zip(scores.tolist(), head.group_rows.tolist(), strict=True):
        steps = grid.midpoints
        if isinstance(head.law, CapacityLaw):
            size = grid.dim * math.log2(1 + math.exp(score + shift)) / 2 / BITS
            steps = grid.sizes[1:]
        elif isinstance(head, OrdinalSizes):
            low = 1 if grid.sizes[0] else 0.25
            size = low * (grid.dim / low) ** (1 / (1 + math.exp(-(score + shift))))
        else:
            size = math.exp(score + shift)
        level = sum(size >= step for step in steps)
        total += rows * grid.stored[level]
    return total


@st.composite
def budget_cases(draw):
    dim = draw(st.sampled_from([1, 2, 3, 8, 16, 17, 64]))
    grid = SizeGrid(
        dim,
        draw(st.integers(0, max(1, dim // 4))),
        draw(st.integers(1, max(1, dim // 4))),
        draw(st.integers(1, max(1, dim // 4))),
    )
    least = max(grid.stored[0] / dim, 1e-3)
    budget = draw(st.floats(least, 1.0))
    fields = draw(st.integers(1, 3))
    shape = st.lists(st.integers(0, 20) | st.integers(0, 10**9), min_size=1, max_size=40)
    counts = [draw(shape) for _ in range(fields)]
    groups = frequency_groups(
        torch.tensor([c for f in counts for c in f]), [len(f) for f in counts]
    )
    return groups, grid, budget


@settings(max_examples=120)
@given(
    budget_cases(),
    st.sampled_from(["ordinal", "rule"]),
    st.sampled_from([None, 0.5]),
    st.integers(0, 99),
)
def test_budget_is_met_and_never_exceeded(case, parametrization, exponent, seed):
    groups, grid, budget = case
    head = make_size_head(
        parametrization, groups, grid, budget, capacity_bits=BITS, init_exponent=exponent
    )
    if parametrization == "ordinal":
        randomise(head, seed=seed)
        scores = head.scores().detach().double()
        shift = float(head._solve(scores)[0])
    else:
        scores = head.scores()
        shift = float(head._solve(scores)[0])
    limit = budget * head.num_rows * grid.dim
    stored = head.stored_fraction() * head.num_rows * grid.dim
    assert stored <= limit * (1 + 1e-9)
    assert set(head.sizes().tolist()) <= set(grid.sizes)
    # Close to the budget: the next step (of one group, or of groups with equal scores) is too much.
    if stored < head.num_rows * grid.dim:
        assert stored_if(head, scores, shift + 1e-7) > limit * (1 - 1e-9)
    else:
        assert head.sizes().tolist() == [grid.dim] * head.num_groups


@settings(max_examples=40)
@given(budget_cases(), st.integers(0, 99))
def test_free_logits_with_a_budget_never_exceed_it(case, seed):
    groups, grid, budget = case
    head = randomise(FreeSizes(groups, grid, budget), 0.5, seed)
    stored = head.stored_fraction() * head.num_rows * grid.dim
    assert stored <= budget * head.num_rows * grid.dim * (1 + 1e-9)
    assert set(head().dims.tolist()) <= set(grid.sizes)


@pytest.mark.parametrize("parametrization", ["ordinal", "rule"])
@pytest.mark.parametrize(("dim", "budget"), [(16, 0.125), (16, 0.25), (64, 0.05), (64, 0.4)])
def test_budget_is_close_on_a_long_tail(parametrization, dim, budget):
    counts = zipf_counts(20000)
    head = make_size_head(
        parametrization,
        frequency_groups(counts),
        SizeGrid(dim, tier_width=default_tier_width(dim, budget, 4)),
        budget,
    )
    largest_step = float(head.steps.max()) * float(head.rows.max()) / (len(counts) * dim)
    assert budget - largest_step <= head.stored_fraction() <= budget


def test_full_budget_keeps_everything():
    groups = frequency_groups(zipf_counts(500))
    for parametrization in ("ordinal", "rule"):
        head = make_size_head(parametrization, groups, SizeGrid(8), 1.0)
        assert head.stored_fraction() == 1.0


def test_solvers_are_operators():
    args = (torch.randn(7).double(), torch.ones(7).double(), torch.arange(3).double())
    torch.library.opcheck(fit_shift, (*args, torch.ones(3).double(), 9.0))
    logits = (torch.randn(7, 3), torch.ones(7).double(), torch.tensor([0.1, 0.2, 0.3]))
    torch.library.opcheck(fit_tilt, (*logits, torch.tensor([1.0, 2.0, 3.0]).double(), 12.0))


def test_budget_solver_is_cheap():
    """A few thousand groups: about a third of a millisecond when the machine is quiet."""
    counts = torch.arange(4000).flip(0)
    head = make_size_head("ordinal", frequency_groups(counts), SizeGrid(64), 0.4)
    scores = head.scores().detach().double()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        head._solve(scores)
        times.append(time.perf_counter() - start)
    assert min(times) < 3e-3


# Ordinal


def test_ordinal_starts_at_the_rule():
    """d log k / d log(count + 1) is the exponent where k is the square root of D."""
    counts = torch.arange(2000).flip(0)
    dim, exponent = 256, 0.5
    head = make_size_head(
        "ordinal", frequency_groups(counts), SizeGrid(dim, 1), 0.1, init_exponent=exponent
    )
    scores = head.scores()
    log_sizes = head.log_sizes(scores, head._solve(scores)[0]).detach().double()
    log_counts = torch.log1p(head.group_counts.double())
    middle = int((log_sizes - math.log(dim) / 2).abs().argmin())
    slope = (log_sizes[middle - 5] - log_sizes[middle + 5]) / (
        log_counts[middle - 5] - log_counts[middle + 5]
    )
    assert float(slope) == pytest.approx(exponent, rel=0.02)
    assert bool((head.sizes()[:-1] >= head.sizes()[1:]).all())


@pytest.mark.parametrize("exponent", [None, 0.5])
def test_ordinal_mask_kernel(exponent):
    groups = frequency_groups(zipf_counts(300))
    head = make_size_head("ordinal", groups, SizeGrid(16), 0.3, init_exponent=exponent)
    randomise(head, 0.3)
    head.set_temperature(0.5)
    scores = head.scores()
    log_sizes = head.log_sizes(scores, head._solve(scores)[0])
    # The capacity law cuts sizes, the power law rounds them.
    columns = torch.log(torch.arange(1, 17) - (0.0 if exponent is None else 0.5))
    expected = torch.sigmoid((log_sizes[:, None] - columns) / (0.3 * 0.5))
    with torch.no_grad():
        sizes, mask, _ = head()
    torch.testing.assert_close(mask, expected)
    # The hard size is where the soft mask crosses 1/2. The group that would take the next step of
    # the budget sits a hair below its threshold, closer than float32 can tell.
    crossing = (mask - 0.5).abs() < 1e-5
    kept = torch.arange(1, 17) <= sizes[:, None]
    assert torch.equal((mask >= 0.5) | crossing, kept | crossing)
    assert int(crossing.sum()) <= 1
    assert torch.equal(sizes.long(), head.sizes())


def real_size(head, u):
    """Continuous sizes by the definitions."""
    dim = head.grid.dim
    if isinstance(head.law, CapacityLaw):
        return dim * torch.log2(1 + torch.exp(u)) / 2 / BITS
    return torch.exp(math.log(dim) * torch.sigmoid(u))


@pytest.mark.parametrize("exponent", [None, 0.5])
def test_ordinal_gradient_keeps_the_budget(exponent):
    """Autograd against finite differences of the problem with k and its budget made continuous."""
    torch.manual_seed(1)
    groups = frequency_groups(zipf_counts(60))
    grid = SizeGrid(16, 0 if exponent is None else 1)
    head = make_size_head("ordinal", groups, grid, 0.2, init_exponent=exponent)
    head = to_double(randomise(head, 0.1))
    scores = head.scores().detach().requires_grad_()
    shift = head._solve(scores.detach())[0]
    signal = torch.randn(head.num_groups, 16, dtype=torch.float64)

    def loss_of(log_sizes):
        mask = torch.sigmoid((log_sizes[:, None] - head.log_columns) / 0.3)
        return (signal * mask).sum()

    loss_of(head.log_sizes(scores, shift)).backward()

    def mass(f, c):
        return (head.rows * real_size(head, f + c)).sum()

    target = mass(scores.detach(), shift)

    def solved(f):
        low, high = shift - 1, shift + 1
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (low, middle) if mass(f, middle) > target else (middle, high)
        return torch.log(real_size(head, f + (low + high) / 2))

    step = 1e-5
    assert float(real_size(head, scores.detach() + shift).max()) < 16
    for group in range(0, head.num_groups, 7):
        nudge = torch.zeros_like(scores)
        nudge[group] = step
        f = scores.detach()
        numeric = (loss_of(solved(f + nudge)) - loss_of(solved(f - nudge))) / (2 * step)
        torch.testing.assert_close(scores.grad[group], numeric, rtol=1e-4, atol=1e-6)


def test_ordinal_learns_where_memory_pays():
    """A gradient that asks for longer rows in one field moves memory there, at one budget."""
    counts = torch.cat([zipf_counts(300), zipf_counts(300)])
    head = make_size_head("ordinal", frequency_groups(counts, [300, 300]), SizeGrid(16), 0.3)
    first = head.group_fields == 0
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    before = head.sizes()
    for _ in range(30):
        mask = head().mask
        loss = (head.rows[:, None] * torch.where(first[:, None], -mask, mask)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = head.sizes()
    rows = head.group_rows
    assert (after * rows)[first].sum() > 1.2 * (before * rows)[first].sum()
    assert head.stored_fraction() <= 0.3


# Free logits: the paper


class HardWithSoftGradient(torch.autograd.Function):
    """t forward, p backward."""

    @staticmethod
    def forward(ctx, p):
        return nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def paper_layer(weight, indices, features, counts, branches, temperature):
    """The paper's layer as docs/method.md has it, row by row; the twins' weights are given."""
    norm = torch.log1p(counts.double())
    norm = (norm - norm.mean()) / norm.std(unbiased=False)
    alpha = torch.sigmoid(norm).to(weight.dtype)[:, None]
    high, low = (perceptron(features, layers) for layers in branches.layers().values())
    z = alpha * high + (1 - alpha) * low
    p = torch.softmax(z / temperature, dim=1)
    t = HardWithSoftGradient.apply(p)
    mask = t.flip(1).cumsum(1).flip(1)
    return (mask * weight)[indices], p, z


def paper_case(dtype, distinct):
    torch.manual_seed(2)
    rows, dim = 40, 7
    counts = torch.arange(rows).flip(0) if distinct else torch.randint(0, 9, (rows,))
    groups = frequency_groups(counts)
    head = randomise(FreeSizes(groups, SizeGrid(dim, 1), None), 0.7)
    if dtype == torch.float64:
        to_double(head)
        head.gate = torch.sigmoid(
            (lambda x: (x - x[groups.row_group].mean()) / x[groups.row_group].std(unbiased=False))(
                torch.log1p(head.group_counts.double())
            )
        )
    head.set_temperature(0.6)
    weight = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    indices = torch.randperm(rows)[:30] if distinct else torch.randint(0, rows, (90,))
    return groups, head, weight, indices, counts


def product_and_paper(groups, head, weight, indices, counts):
    with amtl_kernels.use_backend("reference"):
        sizes, mask, _ = head()
        ours = amtl_kernels.adaptive_embedding(
            weight, indices, groups.row_group, sizes, mask, sparse=False
        )
    features = head.features[groups.row_group.long()]
    paper, p, z = paper_layer(weight, indices, features, counts, head.branches, head.temperature)
    delta = torch.randn(ours.shape, dtype=ours.dtype)
    wanted = [weight, *head.parameters()]
    with amtl_kernels.use_backend("reference"):
        our_grads = torch.autograd.grad(ours, wanted, delta)
    paper_grads = torch.autograd.grad(paper, wanted, delta, retain_graph=True)
    p_grad, z_grad = torch.autograd.grad(paper, [p, z], delta)
    return ours, paper, our_grads, paper_grads, p, p_grad, z_grad, delta


def test_paper_mode_is_the_paper_bit_for_bit():
    case = paper_case(torch.float32, distinct=True)
    ours, paper, our_grads, paper_grads, *_ = product_and_paper(*case)
    assert torch.equal(ours, paper)
    for a, b in zip(our_grads, paper_grads, strict=True):
        assert torch.equal(a, b)


def test_paper_mode_is_the_paper_with_groups_and_repeats():
    case = paper_case(torch.float64, distinct=False)
    ours, paper, our_grads, paper_grads, *_ = product_and_paper(*case)
    assert torch.equal(ours, paper)
    for a, b in zip(our_grads, paper_grads, strict=True):
        # The mask gradient passes through the float32 soft mask of the product.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_paper_gradients_are_the_formulas():
    case = paper_case(torch.float64, distinct=False)
    _, head, weight, indices, _ = case
    _, paper, our_grads, _, p, p_grad, z_grad, delta = product_and_paper(*case)
    sizes = p.argmax(1) + 1
    w_formula = torch.zeros_like(weight)
    p_formula = torch.zeros_like(p)
    for lookup, row in enumerate(indices.tolist()):
        for j in range(weight.shape[1]):
            if j < sizes[row]:
                w_formula[row, j] += delta[lookup, j]
            for k in range(j, weight.shape[1]):
                p_formula[row, k] += delta[lookup, j] * weight[row, j].detach()
    temperature = float(head.temperature)
    inner = (p * p_formula).sum(1, keepdim=True)
    z_formula = p / temperature * (p_formula - inner)
    torch.testing.assert_close(our_grads[0], w_formula)
    torch.testing.assert_close(p_grad, p_formula)
    torch.testing.assert_close(z_grad, z_formula)
    assert float(paper.detach().abs().sum()) > 0


def test_ties_go_to_the_smaller_size():
    head = FreeSizes(frequency_groups(torch.arange(9)), SizeGrid(6, 1), None)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    assert head().dims.tolist() == [1] * 9


def test_fewer_logits_with_granularity():
    head = FreeSizes(frequency_groups(torch.arange(9)), SizeGrid(10, 2, 4), None)
    assert head.branches.widths[-1] == 3
    mask = head().mask
    assert mask.shape == (9, 10)
    torch.testing.assert_close(mask[:, :4], torch.ones(9, 4))
    assert torch.equal(mask[:, 4], mask[:, 7]) and torch.equal(mask[:, 8], mask[:, 9])


# The laws


@pytest.mark.parametrize("bits", [0.5, 4.0, 40.0])
@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
def test_capacity_law(bits, parametrization):
    """Some one rho explains all sizes: k = floor(D / 2 * log2(1 + rho * count) / bits)."""
    counts = zipf_counts(3000)
    dim = 32
    head = make_size_head(
        parametrization, frequency_groups(counts), SizeGrid(dim), 0.1, capacity_bits=bits
    )
    sizes = head.sizes().double()

    def least_rho(k):
        return (2 ** (2 * bits * k / dim) - 1) / head.group_counts

    low = least_rho(sizes)[sizes > 0].max()
    high = least_rho(sizes + 1)[sizes < dim].min()
    assert int(sizes.unique().numel()) > 2 and low <= high * (1 + 1e-6)


def test_capacity_law_from_flat_to_proportional():
    counts = zipf_counts(3000).clamp(min=1)
    groups = frequency_groups(counts)
    flat = make_size_head("rule", groups, SizeGrid(16), 0.125, capacity_bits=1e3)
    assert flat.sizes().tolist() == [2] * flat.num_groups
    with_unseen = torch.cat([counts, torch.zeros(500, dtype=torch.int64)])
    flat = make_size_head(
        "rule", frequency_groups(with_unseen), SizeGrid(16), 0.125, capacity_bits=1e3
    )
    # What rows never seen leave over goes to the most frequent ones.
    assert int(flat.sizes()[:-1].min()) == 2 and int(flat.sizes()[-1]) == 0
    assert bool((flat.sizes().diff() <= 0).all()) and int(flat.sizes()[0]) == 3
    steep = make_size_head("rule", groups, SizeGrid(64), 0.01, capacity_bits=1e-4)
    inside = (steep.sizes() > 4) & (steep.sizes() < 64)
    ratio = (steep.sizes() / steep.group_counts)[inside]
    assert int(inside.sum()) > 3 and float(ratio.max() / ratio.min()) < 1.25


@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
@pytest.mark.parametrize(("dim", "bits"), [(1024, 64.0), (1024, 1e3), (1, 64.0), (1024, 1e-6)])
def test_capacity_law_stays_finite(parametrization, dim, bits):
    counts = torch.tensor([0, 1, 2, 10**6, 10**12])
    head = make_size_head(
        parametrization,
        frequency_groups(counts),
        SizeGrid(dim),
        0.4,
        capacity_bits=bits,
        size_noise=0.5,
    )
    sizes = head(True)
    assert head.stored_fraction() <= 0.4
    assert int(sizes.dims.min()) >= 0 and int(sizes.dims.max()) <= dim
    assert bool(torch.isfinite(sizes.mask).all())
    if parametrization == "ordinal":
        sizes.mask.sum().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in head.parameters())


@pytest.mark.parametrize("exponent", [None, 0.5])
def test_rows_never_seen_come_last(exponent):
    groups = frequency_groups(torch.tensor([5, 3, 1, 0, 0]))
    sizes = make_size_head("rule", groups, SizeGrid(4), 0.6, init_exponent=exponent).sizes()
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    if exponent is None:
        assert sizes.tolist() == [4, 4, 4, 0]
        full = make_size_head("rule", groups, SizeGrid(4), 1.0)
        assert full.sizes().tolist() == [4] * 4


def test_power_law_can_round_to_nothing():
    for parametrization in ("rule", "ordinal"):
        head = make_size_head(
            parametrization,
            frequency_groups(zipf_counts(3000)),
            SizeGrid(16),
            0.03,
            init_exponent=1.0,
        )
        sizes = head.sizes()
        assert int(sizes[-1]) == 0 and int(sizes[0]) > 1
        assert 0.025 < head.stored_fraction() <= 0.03


@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
@pytest.mark.parametrize("exponent", [None, 0.5])
def test_field_weights_multiply_counts(parametrization, exponent):
    """A weight of 8 does what counts of 8 times as much do, and the budget stays."""
    # Beyond 1,000, so that count + 1 is the count.
    counts = (1000 * zipf_counts(600)).view(2, 300) + 1000
    both = counts.flatten()
    scaled = torch.cat([counts[0], 8 * counts[1]])
    options = {"capacity_bits": 4.0, "init_exponent": exponent}
    grid, fields = SizeGrid(16), [300, 300]
    plain = make_size_head(parametrization, frequency_groups(both, fields), grid, 0.2, **options)
    wanted = make_size_head(
        parametrization, frequency_groups(scaled, fields), grid, 0.2, **options
    ).sizes()
    before = plain.sizes()
    weighted = make_size_head(
        parametrization,
        frequency_groups(both, fields),
        grid,
        0.2,
        field_weights=[1, 8],
        **options,
    )
    assert int((weighted.sizes() - wanted).abs().max()) <= 1
    assert float((weighted.sizes() == wanted).double().mean()) > 0.97
    plain.set_field_weights(torch.tensor([2.0, 16.0]))
    assert float((plain.sizes() == weighted.sizes()).double().mean()) > 0.97
    assert not torch.equal(plain.sizes(), before)
    assert plain.stored_fraction() <= 0.2
    fresh = make_size_head(parametrization, frequency_groups(both, fields), grid, 0.2, **options)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.sizes(), plain.sizes())
    old = {k: v for k, v in plain.state_dict().items() if k != "field_weights"}
    fresh.load_state_dict(old)
    assert torch.equal(fresh.sizes(), before)
    for bad in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="field_weights"):
            plain.set_field_weights(bad)


def test_rule_is_a_scaled_power_of_the_count():
    counts = zipf_counts(3000)
    head = make_size_head("rule", frequency_groups(counts), SizeGrid(32, 1), 0.2, init_exponent=0.7)
    power = (head.group_counts.double() + 1) ** 0.7
    sizes = head.sizes()
    inside = (sizes > 1) & (sizes < 32)
    # Some one scale explains all sizes: the intervals of scales that round to each k overlap.
    low = ((sizes - 0.5) / power)[inside].max()
    high = ((sizes + 0.5) / power)[inside].min()
    assert int(inside.sum()) > 5 and low <= high * (1 + 1e-9)
    assert not list(head.parameters())
    assert not head().mask.requires_grad


@pytest.mark.parametrize("budget", ["2kB", "0.1", [0.1], float("nan"), True, 5.0])
def test_a_budget_that_is_no_share_is_named(budget):
    message = r"budget must be a fraction in \(0, 1\], got "
    with pytest.raises(ValueError, match=message + re.escape(repr(budget))):
        AMTLEmbedding(10, 4, counts=torch.arange(10), budget=budget)


def test_rule_and_ordinal_need_a_budget():
    groups = frequency_groups(torch.arange(5))
    for parametrization in ("rule", "ordinal"):
        with pytest.raises(ValueError, match="needs a budget"):
            make_size_head(parametrization, groups, SizeGrid(8), None)


# Noise


@pytest.mark.parametrize("parametrization", ["ordinal", "rule", "free"])
@pytest.mark.parametrize("dim", [8, 64, 300])
def test_noise_columns_are_quantiles_of_log_size(parametrization, dim):
    groups = frequency_groups(zipf_counts(300))
    head = make_size_head(parametrization, groups, SizeGrid(dim, 1), 0.3, size_noise=0.5)
    plain, noisy = head(False).dims, head(True).dims
    assert plain.shape == (head.num_groups,) and noisy.shape == (head.num_groups, 64)
    assert plain.dtype == noisy.dtype == (torch.uint8 if dim <= 255 else torch.int32)
    assert int(noisy.min()) >= 1 and int(noisy.max()) <= dim
    assert bool((noisy[:, 1:].int() >= noisy[:, :-1].int()).all())
    # The middle of the noise is the size without it (which rounds a fraction).
    middle = noisy[:, 31].int()
    assert int((middle - plain.int()).abs().max()) <= max(1, dim // 40)
    row = int((plain.float() - dim / 4).abs().argmin())
    quantile = torch.special.ndtri(torch.tensor(48.5 / 64))
    expected = float(plain[row]) * math.exp(0.5 * float(quantile))
    assert float(noisy[row, 48]) == pytest.approx(expected, rel=0.15, abs=1.25)


def test_noise_is_centred_with_its_deviation():
    head = make_size_head(
        "rule",
        frequency_groups(torch.arange(9)),
        SizeGrid(8),
        0.5,
        size_noise=0.5,
        noise_quantiles=64,
    )
    logs = head.noise_factors.double().log()
    torch.testing.assert_close(logs, -logs.flip(0), rtol=0, atol=1e-6)
    assert float(logs.std(unbiased=False)) == pytest.approx(0.5, rel=0.02)


def test_noise_respects_the_grid():
    groups = frequency_groups(zipf_counts(300))
    head = make_size_head("rule", groups, SizeGrid(32, 8, 4), 0.5, size_noise=1.0)
    assert set(head(True).dims.unique().tolist()) <= set(head.grid.sizes)


@pytest.mark.parametrize("parametrization", ["ordinal", "rule", "free"])
@pytest.mark.parametrize("granularity", [1, 3])
def test_noise_never_decides_whether_a_row_keeps_anything(parametrization, granularity):
    head = make_size_head(
        parametrization,
        frequency_groups(zipf_counts(300)),
        SizeGrid(16, 0, granularity),
        0.1,
        size_noise=2.0,
    )
    randomise(head, 0.3)
    sizes = head(True)
    nothing = sizes.sizes == 0
    assert bool(nothing.any()) and not bool(nothing.all())
    assert torch.equal((sizes.dims == 0).all(1), nothing)
    assert torch.equal((sizes.dims == 0).any(1), nothing)
    assert set(sizes.dims.unique().tolist()) <= set(head.grid.sizes)


def test_no_noise_is_no_columns():
    head = make_size_head(
        "rule", frequency_groups(torch.arange(9)), SizeGrid(8), 0.5, size_noise=0.0
    )
    assert head(True).dims.ndim == 1


# Arguments and the module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_exponent": -1.0}, "init_exponent"),
        ({"capacity_bits": 0.0}, "capacity_bits"),
        ({"capacity_bits": float("nan")}, "capacity_bits"),
        ({"field_weights": [1.0, 2.0]}, "field_weights"),
        ({"init_exponent": float("inf")}, "init_exponent"),
        ({"kernel_width": 0.0}, "kernel_width"),
        ({"hidden": (0,)}, "hidden"),
        ({"size_noise": -0.1}, "size_noise"),
        ({"size_noise": float("nan")}, "size_noise"),
        ({"noise_quantiles": 0}, "noise_quantiles"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        make_size_head("ordinal", frequency_groups(torch.arange(5)), SizeGrid(8), 0.5, **change)
    with pytest.raises(ValueError, match="parametrization"):
        make_size_head("learned", frequency_groups(torch.arange(5)), SizeGrid(8), 0.5)


@pytest.mark.parametrize("parametrization", ["ordinal", "rule", "free"])
def test_sizes_do_not_depend_on_the_type_of_the_model(parametrization):
    head = make_size_head(
        parametrization, frequency_groups(zipf_counts(400)), SizeGrid(16), 0.3, size_noise=0.5
    )
    before = head.sizes()
    head.half()
    head.to(torch.bfloat16)
    assert torch.equal(head.sizes(), before)
    assert all(b.dtype != torch.float16 for b in (*head.buffers(), *head.parameters()))


@pytest.mark.parametrize("parametrization", ["ordinal", "rule", "free"])
def test_state_brings_its_own_counts(parametrization):
    trained = make_size_head(parametrization, frequency_groups(zipf_counts(400)), SizeGrid(16), 0.3)
    randomise(trained, 0.3)
    fresh = make_size_head(parametrization, frequency_groups(torch.zeros(3)), SizeGrid(16), 0.3)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.sizes(), trained.sizes())
    assert fresh.stored_fraction() == trained.stored_fraction()
    assert torch.equal(fresh(True).dims, trained(True).dims)


def test_states_with_a_parameter_a_layer_load():
    twins = TwinBranches(3, (4, 5), 2)
    state = {
        f"{name}.{2 * i}.{kind}": value.clone()
        for name, layers in twins.layers().items()
        for i, layer in enumerate(layers)
        for kind, value in zip(("weight", "bias"), layer, strict=True)
    }
    assert len(state) == 12
    other = TwinBranches(3, (4, 5), 2)
    assert not torch.equal(other.numbers, twins.numbers)
    other.load_state_dict(state)
    assert torch.equal(other.numbers, twins.numbers)


def test_single_branch_ignores_the_gate():
    branch = TwinBranches(3, (4,), 2, twins=False)
    features = torch.randn(5, 3)
    assert torch.equal(branch(features, torch.zeros(5)), branch(features, torch.ones(5)))
    assert sum(p.numel() for p in branch.parameters()) == 3 * 4 + 4 + 4 * 2 + 2


def test_width_one_has_one_size():
    for parametrization in ("ordinal", "rule", "free"):
        head = make_size_head(parametrization, frequency_groups(torch.arange(9)), SizeGrid(1), 1.0)
        sizes, mask, _ = head()
        if parametrization != "free":
            assert sizes.tolist() == [1] * 9
        assert mask.shape == (9, 1)
        assert bool(torch.isfinite(mask).all())
        if mask.requires_grad:
            mask.sum().backward()
            assert all(bool(torch.isfinite(p.grad).all()) for p in head.parameters())
