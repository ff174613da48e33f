"""Tables that are described to native code once, and looked up in past PyTorch's dispatcher."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Call, Case, build, call, cases, in_order
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import amtl_kernels as ak
from amtl_kernels import TieredTable
from amtl_kernels._arguments import Bags, FewBits, Tables
from amtl_kernels._planned import Plan, unobserved

pytestmark = pytest.mark.skipif(
    "error" in ak.build_info()["native"], reason="there is no native module: make test builds it"
)


def made(case: Case, form: str, pooled: bool, bits: int | None, coded: bool) -> Call:
    """Of a case; its tiers as numbers, as numbers that lookups round, or as codes."""
    of = build(case).call(form, pooled, dims=[case.dim])
    if bits is None or form != "tiered":
        return of
    g = torch.Generator().manual_seed(case.seed)
    blocks = of.tables["blocks"]
    of.few_bits = {"steps": [torch.rand(len(blocks), generator=g) + 0.5], "bits": [bits]}
    if coded:
        shapes = [(len(block), block.shape[1] * bits // 8) for block in blocks]
        codes = [torch.randint(256, s, dtype=torch.uint8, generator=g) for s in shapes]
        of.tables["blocks"] = codes
        if of.has_weights:
            of.bags["per_sample_weights"] = of.bags["per_sample_weights"].float()
    return of


def asked(of: Call) -> Tensor:
    """What the operator says."""
    return torch.ops.amtl.lookup(*in_order("lookup", of.lookup()))


def planned(of: Call) -> Plan:
    """A plan that has been asked once, as only those are used that are asked again."""
    tables, few = Tables(**of.tables), FewBits(**of.few_bits) if of.few_bits else None
    numbers = few.steps[0] if few and tables.blocks[0].dtype == torch.uint8 else tables.blocks[0]
    plan = Plan(tables, few, numbers)
    assert plan.rows(torch.zeros(1, dtype=torch.int64), 1) is None
    return plan


@contextmanager
def running_on(capability: str) -> Iterator[None]:
    """With the kernels of an instruction set, or the best ones where it has none."""
    native = pytest.importorskip("amtl_kernels._C")
    native.use_cpu_capability(capability)
    try:
        yield
    finally:
        native.use_cpu_capability("")


CAPABILITIES = ["", "avx2", "generic"]


@given(
    case=cases(),
    form=st.sampled_from(["tiered", "masked", "adaptive"]),
    pooled=st.booleans(),
    bits=st.sampled_from([None, 2, 4, 8, 16]),
    coded=st.booleans(),
    capability=st.sampled_from(CAPABILITIES),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_it_is_the_operator_bit_for_bit(
    case: Case, form: str, pooled: bool, bits: int | None, coded: bool, capability: str
) -> None:
    of = made(case, form, pooled, bits, coded)
    bags = Bags(**of.bags)
    plan = planned(of)
    with torch.no_grad(), running_on(capability):
        want = asked(of)
        got = plan.bags(bags, 1)
    if bags.indices.numel() == 0 or (pooled and bags.offsets.numel() == 0):
        assert got is None
        return
    assert got is not None and got.dtype == want.dtype
    assert got.shape == want.shape and torch.equal(got, want)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [None, 2, 4, 8, 16])
@pytest.mark.parametrize("rows", [4096, 4097])
@pytest.mark.parametrize("dim", [5, 16, 40, 70])
def test_rows_of_small_tables_are_found_once(
    rows: int, dim: int, bits: int | None, capability: str
) -> None:
    """In an order too, with more lookups than a thread picks; and whatever is written shows."""
    g = torch.Generator().manual_seed(rows + dim)
    widths = [dim - dim % 4, 4, 0] if bits else [dim, 3, 0]
    ends = [100, rows - 50, rows]
    lengths = [100, rows - 150, 50]
    few = {"steps": torch.rand(3, generator=g) + 0.5, "bits": bits} if bits else {}
    blocks = [
        torch.randint(256, (n, w * bits // 8), dtype=torch.uint8, generator=g)
        if bits
        else -torch.rand(n, w, generator=g).round()
        for n, w in zip(lengths, widths, strict=True)
    ]
    order = torch.randperm(rows, generator=g).to(torch.int32)
    indices = torch.randint(rows, (2**17 // dim + 1000,), generator=g)
    table = TieredTable.of(blocks, ends, dim, **few)
    operator = ak.tiered_embedding
    with torch.no_grad(), running_on(capability):
        assert table.plan.rows(indices, 1, order) is None
        for writes in (
            lambda: None,
            lambda: order.copy_(order.flip(0)),
            lambda: order.data.copy_(order.flip(0).roll(1)),
            lambda: [block.copy_(block.flip(0)) for block in blocks],
            lambda: [steps.mul_(2) for steps in table.few.steps] if bits else None,
        ):
            writes()
            for of in (order, None):
                got = table.plan.rows(indices, 1, of)
                places = indices if of is None else order[indices]
                want = operator(blocks, ends, places, embedding_dim=dim, **few)
                assert got is not None and torch.equal(got, want)
                # Not even the sign of a zero differs.
                assert torch.equal(got.signbit(), want.signbit())
        for wrong in (-1, rows):
            assert table.plan.rows(torch.tensor([0, wrong]), 1, order) is None
            table.plan.rows(indices, 1, order)
        order[7] = rows
        assert table.plan.rows(torch.tensor([0, 7]), 1, order) is None


def test_sizes_that_are_written_to_show() -> None:
    g = torch.Generator().manual_seed(1)
    weight, indices = torch.randn(60, 8, generator=g), torch.arange(60)
    groups = torch.randint(4, (60,), dtype=torch.int32, generator=g)
    sizes = torch.tensor([0, 3, 5, 8], dtype=torch.uint8)
    plan = Plan(Tables([weight], [1], [8], [sizes], [groups]), None, weight)
    with torch.no_grad():
        assert plan.rows(indices, 1) is None
        for writes in (lambda: None, lambda: sizes.copy_(sizes.flip(0)), lambda: groups.zero_()):
            writes()
            got = plan.rows(indices, 1)
            mask = torch.arange(8) < sizes[groups.long(), None]
            assert got is not None and torch.equal(got, weight * mask)
        sizes[0] = 9
        assert plan.rows(indices, 1) is None
        with pytest.raises(ValueError, match=r"is outside 0\.\.8"):
            ak.adaptive_embedding(weight, indices, groups, sizes, torch.zeros(4, 8))


@pytest.fixture
def table() -> TieredTable:
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randn(40, 8, generator=g), torch.randn(60, 3, generator=g)]
    return TieredTable.of(blocks, [40, 100], 16)


INDICES = torch.tensor([0, 99, 40, 39, 7])


def known(table: TieredTable) -> TieredTable:
    """The table, looked up in twice, so that its plan is made."""
    with torch.no_grad():
        for _ in range(2):
            table.embedding(INDICES)
    assert table.plan._handle
    return table


def test_what_is_written_or_put_elsewhere_shows(table: TieredTable) -> None:
    first = known(table).tables.blocks[0]
    handle = table.plan._handle
    with torch.no_grad():
        first.mul_(2)
        assert torch.equal(table.embedding(INDICES)[0, :8], first[0])
        assert table.plan._handle is handle
        first.data = torch.ones(40, 8)
        assert table.embedding(INDICES)[0, :8].eq(1).all()
        assert table.embedding(INDICES)[0, :8].eq(1).all()
        assert table.plan._handle and table.plan._handle is not handle


@pytest.mark.filterwarnings("ignore:index .* was clamped")
def test_errors_are_those_of_the_operator(table: TieredTable) -> None:
    known(table)
    offsets = torch.tensor([0, 3, 2])
    with torch.no_grad():
        for at in (-1, 100):
            wrong = torch.tensor([0, at])
            with pytest.raises(IndexError, match=f"index {at} at position 1 is out of range"):
                table.embedding(wrong)
            clamped = table.embedding(wrong, bounds_check="clamp")
            assert torch.equal(clamped, table.embedding(wrong.clamp(0, 99)))
        with pytest.raises(ValueError, match="offsets must not decrease"):
            table.embedding_bag(INDICES, offsets)
        with pytest.raises(ValueError, match="offsets must start at 0"):
            table.embedding_bag(INDICES, offsets.flip(0))
        assert known(table).embedding_bag(INDICES, torch.tensor([0, 5])).shape == (2, 16)


class Seen(TorchDispatchMode):
    """Which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_who_looks_at_operators_sees_them(table: TieredTable) -> None:
    known(table)
    with torch.no_grad(), Seen() as seen:
        table.embedding(INDICES)
    assert seen.names.count("lookup.default") == 1
    with torch.no_grad(), torch.profiler.profile() as profile:
        table.embedding(INDICES)
    assert "amtl::lookup" in {event.key for event in profile.key_averages()}
    with torch.no_grad():
        assert unobserved()
        with ak.use_backend("reference"):
            assert not unobserved()
        with torch.device("cpu"):
            assert not unobserved()
        with torch.autograd.forward_ad.dual_level():
            assert not unobserved()
        torch.func.vmap(lambda x: x if not unobserved() else None)(INDICES)
    assert not unobserved()


def test_gradients_flow_where_the_forward_was_planned(table: TieredTable) -> None:
    blocks = [block.clone().requires_grad_() for block in table.tables.blocks]
    with_plan = known(TieredTable.of(blocks, [40, 100], 16))
    with_plan.embedding(INDICES).square().sum().backward()
    again = [block.detach().clone().requires_grad_() for block in blocks]
    ak.tiered_embedding(again, [40, 100], INDICES, embedding_dim=16).square().sum().backward()
    for block, other in zip(blocks, again, strict=True):
        assert torch.equal(block.grad.to_dense(), other.grad.to_dense())


def test_copies_have_plans_of_their_own(table: TieredTable) -> None:
    known(table)
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other.plan is not table.plan and other.plan._handle is None
        with torch.no_grad():
            known(other).tables.blocks[0].zero_()
            assert other.embedding(INDICES)[0].eq(0).all()
            assert not table.embedding(INDICES)[0].eq(0).all()


def test_many_lookups_let_other_threads_run(table: TieredTable) -> None:
    indices = torch.randint(100, (300, 200))
    with torch.no_grad():
        got = known(table).embedding(indices)
    assert torch.equal(got, asked(call(table.tables.blocks, indices, dims=[16])))


def test_the_module_refuses_calls_of_another_shape() -> None:
    native = pytest.importorskip("amtl_kernels._C")
    with pytest.raises(TypeError, match="a plan and 14 numbers"):
        native.lookup(1, 2)
    with pytest.raises(ValueError):
        native.lookup(object(), *range(14))
