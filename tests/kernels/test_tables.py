"""Several tables in one call equal as many calls side by side."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import kernel_calls
import pytest
import torch
from kernel_cases import FORMS, in_order
from kernel_cases import Call as Arguments
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import _schema, fused, optim, reference

SHAPES = ((50, 7), (3, 64), (200, 1), (20, 33))
WIDTHS = ((7, 4, 0), (64,), (1, 1), (20, 0, 9))  # of each table's tiers
DIMS = [7, 64, 1, 40]  # the last tiered table is narrower than its output
BAGS = 9


@dataclass
class Call:
    """A call of one of the forms, and its parts table by table."""

    form: str
    tables: list[Tensor]  # weights, or the blocks of all tables
    masks: list[Tensor]
    weights: Tensor | None
    indices: Tensor
    offsets: Tensor
    row_dims: list[Tensor]
    row_groups: list[Tensor]
    group_dims: list[Tensor]
    ends: list[list[int]]
    padding: list[int | None] = field(default_factory=lambda: [None, 1, None, -1])
    mode: str = "sum"

    def blocks(self) -> list[list[Tensor]]:
        parts = iter(self.tables)
        return [list(itertools.islice(parts, len(widths))) for widths in WIDTHS]

    def learnable(self) -> list[Tensor]:
        return [*self.tables, *self.masks, *([] if self.weights is None else [self.weights])]

    def fresh(self) -> Call:
        tables = [t.detach().clone().requires_grad_() for t in self.tables]
        masks = [m.detach().clone().requires_grad_() for m in self.masks]
        weights = self.weights
        if weights is not None:
            weights = weights.detach().clone().requires_grad_()
        return replace(self, tables=tables, masks=masks, weights=weights)

    def together(self, room: Any = ak, **options: Any) -> Tensor:
        lookups = (self.indices, self.offsets)
        options = {
            "mode": self.mode,
            "per_sample_weights": self.weights,
            "padding_idx": self.padding,
            **options,
        }
        if self.form == "masked":
            op = room.masked_embedding_bag_tables
            return op(self.tables, *lookups, self.row_dims, **options)
        if self.form == "adaptive":
            op = room.adaptive_embedding_bag_tables
            groups = (self.row_groups, self.group_dims, self.masks)
            return op(self.tables, *lookups, *groups, seed=8, **options)
        op = room.tiered_embedding_bag_tables
        return op(self.blocks(), self.ends, *lookups, embedding_dims=DIMS, **options)

    def one_by_one(self) -> Tensor:
        outs = []
        for t in range(len(SHAPES)):
            mine = self.offsets[t * BAGS : (t + 1) * BAGS + 1]
            part = slice(int(mine[0]), int(mine[-1]))
            lookups = (self.indices[part], mine - mine[0])
            options: dict[str, Any] = {
                "mode": self.mode,
                "per_sample_weights": None if self.weights is None else self.weights[part],
                "padding_idx": self.padding[t],
                "include_last_offset": True,
            }
            if self.form == "masked":
                out = ak.masked_embedding_bag(self.tables[t], *lookups, self.row_dims[t], **options)
            elif self.form == "adaptive":
                groups = (self.row_groups[t], self.group_dims[t], self.masks[t])
                out = ak.adaptive_embedding_bag(
                    self.tables[t], *lookups, *groups, seed=8, **options
                )
            else:
                out = ak.tiered_embedding_bag(
                    self.blocks()[t], self.ends[t], *lookups, embedding_dim=DIMS[t], **options
                )
            outs.append(out)
        return torch.cat(outs, 1)

    def operator(self) -> Arguments:
        """The arguments of the operators."""
        tiered = self.form == "tiered"
        dims = DIMS if tiered else [dim for _, dim in SHAPES]
        arguments = kernel_calls.call(
            self.tables,
            self.indices,
            torch.ones(BAGS, sum(dims), dtype=self.tables[0].dtype),
            block_counts=[len(w) for w in WIDTHS] if tiered else [1] * len(SHAPES),
            dims=DIMS if tiered else [],
            sizes={"masked": self.row_dims, "adaptive": self.group_dims}.get(self.form, []),
            row_groups=self.row_groups if self.form == "adaptive" else [],
            seed=8,
            offsets=self.offsets,
            per_sample_weights=self.weights,
            pooling=int(self.mode == "mean"),
            padding_idx=[-1, 1, -1, SHAPES[-1][0] - 1],
            include_last_offset=True,
        )
        return replace(arguments, masks=self.masks)


def make(
    form: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    mode: str = "sum",
    weighted: bool = False,
    extra: int = 0,
) -> Call:
    """``extra`` indices lie past the last offset."""
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(0, 6, (len(SHAPES) * BAGS,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = offsets[::BAGS].tolist()
    parts = [
        torch.randint(0, rows, (end - begin,), generator=g)
        for (rows, _), begin, end in zip(SHAPES, starts[:-1], starts[1:], strict=True)
    ]
    indices = torch.cat([*parts, torch.zeros(extra, dtype=torch.int64)])
    ends = []
    for (rows, _), widths in zip(SHAPES, WIDTHS, strict=True):
        cuts = torch.randint(0, rows + 1, (len(widths) - 1,), generator=g).sort().values
        ends.append([*cuts.tolist(), rows])
    if form == "tiered":
        shapes = [
            (end - begin, width)
            for mine, widths in zip(ends, WIDTHS, strict=True)
            for begin, end, width in zip([0, *mine], mine, widths, strict=False)
        ]
    else:
        shapes = list(SHAPES)

    def on(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.to(device) for tensor in tensors]

    psw = torch.randn(indices.numel(), generator=g).to(dtype).to(device) if weighted else None
    masks = [torch.rand(5, dim, generator=g) for _, dim in SHAPES] if form == "adaptive" else []
    return Call(
        form=form,
        tables=on([torch.randn(*shape, generator=g).to(dtype) for shape in shapes]),
        masks=on(masks),
        weights=psw,
        indices=indices.to(index_dtype).to(device),
        offsets=offsets.to(device),
        row_dims=on(
            [torch.randint(0, dim + 1, (n,), generator=g, dtype=torch.uint8) for n, dim in SHAPES]
        ),
        row_groups=on([torch.randint(0, 5, (n,), generator=g).int() for n, _ in SHAPES]),
        # Sizes of one and of several columns, narrow and wide.
        group_dims=on(
            [
                torch.randint(0, dim + 1, (5,) if t == 1 else (5, t + 1), generator=g).to(
                    torch.uint8 if t == 2 else torch.int32
                )
                for t, (_, dim) in enumerate(SHAPES)
            ]
        ),
        ends=ends,
        mode=mode,
    )


def gradients(call: Call, out: Tensor) -> list[Tensor]:
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * target.to(out.device, out.dtype)).sum().backward()
    grads = [tensor.grad for tensor in call.learnable()]
    assert all(grad is not None for grad in grads)
    return [out.detach(), *(g.to_dense() if g.is_sparse else g.clone() for g in grads)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
@pytest.mark.parametrize(
    ("dtype", "index_dtype"), [(torch.float32, torch.int64), (torch.bfloat16, torch.int32)]
)
def test_equal_to_calls_side_by_side(
    backend: Any, form: str, kind: str, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    mode, weighted = "mean" if kind == "mean" else "sum", kind == "weighted"
    call = make(form, backend.device, dtype, index_dtype, mode, weighted, extra=3)
    results = []
    for batched in (True, False):
        mine = call.fresh()
        results.append(gradients(mine, mine.together() if batched else mine.one_by_one()))
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for together, separate in zip(*results, strict=True):
        torch.testing.assert_close(together, separate, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_one_padding_for_all_tables(backend: Any, form: str) -> None:
    call = make(form, backend.device)
    every = replace(call, padding=[2] * len(SHAPES)).together()
    assert torch.equal(call.together(padding_idx=2), every)
    assert not torch.equal(call.together(padding_idx=None), every)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "make_optimizer",
    [
        optim.SGD,
        optim.RowwiseAdagrad,
        optim.Adam,
        pytest.param(partial(optim.Adam, capturable=True), id="capturable Adam"),
    ],
)
def test_fused_step(backend: Any, form: str, make_optimizer: Any) -> None:
    results = []
    for is_fused in (False, True):
        call = make(form, backend.device, weighted=True).fresh()
        optimizer = make_optimizer(call.tables, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            out = call.together(fused, optimizer=optimizer) if is_fused else call.together()
            out.square().sum().backward()
            assert all((t.grad is None) == is_fused for t in call.tables)
            optimizer.step()
        assert call.weights is not None and call.weights.grad is not None
        results.append([*call.tables, call.weights.grad, *(m.grad for m in call.masks)])
    # Other gradients are float32 sums of products up to about 50, in the backend's own order.
    for separate, fused_result in zip(*results, strict=True):
        torch.testing.assert_close(fused_result, separate, rtol=1e-5, atol=50 * 2.0**-20)


@pytest.mark.parametrize("form", FORMS)
def test_clamping_stays_within_each_table(backend: Any, form: str) -> None:
    call = make(form, backend.device).fresh()
    clamped = call.indices.clone()
    for t, (rows, _) in enumerate(SHAPES):
        first = int(call.offsets[t * BAGS])
        call.indices[first] = rows + 5
        call.indices[first + 1] = -7
        clamped[first], clamped[first + 1] = rows - 1, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = gradients(call, call.together(bounds_check="clamp"))
        optimizer = optim.SGD(call.tables, lr=0.1)
        call.together(fused, optimizer=optimizer, bounds_check="clamp").sum().backward()
    expected = replace(make(form, backend.device), indices=clamped).fresh()
    want = gradients(expected, expected.together())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    optimizer = optim.SGD(expected.tables, lr=0.1)
    expected.together(fused, optimizer=optimizer).sum().backward()
    for a, b in zip(call.tables, expected.tables, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_errors_name_the_table(backend: Any, form: str) -> None:
    call = make(form, backend.device)
    first = int(call.offsets[BAGS])
    before = int(call.indices[first + 2])
    call.indices[first + 2] = 3
    with pytest.raises(IndexError, match=r"table 1: index 3 at position 2 .* a table of 3 rows"):
        call.together()
        ak.synchronize()
    call.indices[first + 2] = before
    for offsets, message in (
        (call.offsets[:-1], "offsets must hold 4"),
        (call.offsets + 1, r"offsets must start at 0, but offsets\[0\] is 1"),
        (call.offsets.index_fill(0, torch.tensor([12], device=backend.device), 0), "decrease"),
        (call.offsets.index_fill(0, torch.tensor([36], device=backend.device), 10**6), "end with"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(call, offsets=offsets).together()
            ak.synchronize()
    with pytest.raises(ValueError, match="table 1: padding_idx 3"):
        call.together(padding_idx=3)
    with pytest.raises(ValueError, match="2 padding_idx for 4 tables"):
        call.together(padding_idx=[0, 0])


@pytest.mark.parametrize("is_fused", [False, True])
def test_errors_name_a_single_table_too(backend: Any, is_fused: bool) -> None:
    table = torch.ones(3, 4, device=backend.device, requires_grad=True)
    sizes = torch.tensor([4, 5, 4], dtype=torch.int32, device=backend.device)
    room: Any = fused if is_fused else ak
    options = {"optimizer": optim.SGD([table])} if is_fused else {}

    def call(indices: list[int], offsets: list[int], **others: Any) -> Tensor:
        lookups = (torch.tensor(v, device=backend.device) for v in (indices, offsets))
        op = room.masked_embedding_bag_tables
        found: Tensor = op([table], *lookups, [sizes], **{**options, **others})
        return found

    # What a later call raises is not named after its function, which may be another.
    name = "" if backend.late else "table 0: "
    with pytest.raises(IndexError, match=rf"^{name}index 3 at position 1 .* of 3 rows"):
        call([0, 3], [0, 2])
        call([0], [0, 1])
        ak.synchronize()
    with pytest.raises(ValueError, match=rf"^{name}.*size"):
        call([0, 1], [0, 2])
        call([0], [0, 1])
        ak.synchronize()
    with pytest.raises(ValueError, match=r"^offsets must end within the 2 indices"):
        call([0, 1], [0, 3])
        ak.synchronize()
    if is_fused:
        other = optim.SGD([torch.ones(1, requires_grad=True)])
        with pytest.raises(ValueError, match=r"^the tables of a fused lookup"):
            call([0, 1], [0, 2], optimizer=other)


@pytest.mark.parametrize("form", FORMS)
def test_a_bad_table_leaves_the_others_alone(form: str) -> None:
    call = make(form)
    call.indices[int(call.offsets[3 * BAGS])] = 77
    update = call.operator().update(reference.ROWWISE_ADAGRAD)
    copies = [block.clone() for block in update["blocks"]]
    with pytest.raises(IndexError, match="table 3: index 77 at position 0"):
        torch.ops.amtl.lookup_update_(*in_order("lookup_update_", update))
    assert all(torch.equal(a, b) for a, b in zip(update["blocks"], copies, strict=True))


@pytest.mark.parametrize("form", ["masked", "adaptive"])
def test_a_bad_size_names_the_table(backend: Any, form: str) -> None:
    call = make(form, backend.device)
    call.row_dims[2].fill_(2)
    call.group_dims[2].fill_(2)
    with pytest.raises(ValueError, match=r"table 2: .*size"):
        call.together()
        ak.synchronize()


@pytest.mark.parametrize("form", FORMS)
def test_no_bags_at_all(backend: Any, form: str) -> None:
    call = make(form, backend.device).fresh()
    call.offsets = call.offsets[:1]
    out = call.together()
    assert out.shape == (0, sum(DIMS if form == "tiered" else [dim for _, dim in SHAPES]))
    out.sum().backward()
    assert all(table.grad is not None and table.grad._nnz() == 0 for table in call.tables)


@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_change_a_bit(form: str) -> None:
    """Also where one table holds most of the work and is shared by all threads."""
    g = torch.Generator().manual_seed(0)
    call = make(form, weighted=True)
    before = torch.get_num_threads()
    for sizes in ([300] * 4, [9_000, 20, 20, 20]):
        lengths = torch.tensor([n // BAGS for n in sizes]).repeat_interleave(BAGS)
        call.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        call.indices = torch.cat(
            [
                torch.randint(0, rows, (n // BAGS * BAGS,), generator=g)
                for (rows, _), n in zip(SHAPES, sizes, strict=True)
            ]
        )
        call.weights = torch.randn(call.indices.numel(), generator=g)
        results = []
        try:
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                mine = call.fresh()
                found = gradients(mine, mine.together())
                optimizer = optim.RowwiseAdagrad(mine.tables, lr=0.1)
                mine.together(fused, optimizer=optimizer).sum().backward()
                results.append([*found, *mine.tables])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    lookup = make(form, weighted=True).fresh().operator().lookup()
    torch.library.opcheck(torch.ops.amtl.lookup.default, in_order("lookup", lookup))
    plain = make(form, weighted=True).operator()
    backward = in_order("lookup_backward", plain.backward())
    torch.library.opcheck(torch.ops.amtl.lookup_backward.default, backward)
    update = in_order("lookup_update_", plain.update(reference.ROWWISE_ADAGRAD))
    torch.library.opcheck(torch.ops.amtl.lookup_update_.default, update)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("form", FORMS)
def test_compile_traces_forward_and_backward(form: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda call, bounds: call.together(bounds_check=bounds).square(), fullgraph=True
    )
    for bounds in ("raise", "clamp"):
        results = []
        for run in (compiled, lambda call, bounds: call.together(bounds_check=bounds).square()):
            call = make(form, weighted=True).fresh()
            results.append(gradients(call, run(call, bounds)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


class Densify(torch.autograd.Function):
    """The identity; its gradient is dense, as gradcheck wants it."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradcheck_of_the_reference(form: str, mode: str) -> None:
    """In float64, of what is differentiable in the usual sense: all but the masks."""
    call = make(form, dtype=torch.float64, mode=mode, weighted=mode == "sum").fresh()
    masks = [mask.detach() for mask in call.masks]
    count = len(call.tables)

    def run(*tensors: Tensor) -> Tensor:
        weights = tensors[count] if len(tensors) > count else None
        tables = [Densify.apply(table) for table in tensors[:count]]
        return replace(call, tables=tables, weights=weights, masks=masks).together()

    with ak.use_backend("reference"):
        inputs = [*call.tables, *([] if call.weights is None else [call.weights])]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_none_is_an_empty_list(backend: Any) -> None:
    """AOTInductor hands empty lists over as None."""
    blocks = [torch.randn(5, 8, device=backend.device), torch.randn(4, 3, device=backend.device)]
    bags = (torch.tensor([1, 7, 1], device=backend.device), None, None, 0, [-1], False)
    grad = torch.randn(3, 8, device=backend.device)
    wanted: list[Tensor] = []
    for several in ([], None):
        tables = (blocks, [2], several, several, several, 0)
        lookup, wants = (*tables, several, *bags, 1, True), (True, False, False)
        outs = [torch.ops.amtl.lookup(*lookup), torch.ops.amtl.lookup(*lookup, *[several] * 3)]
        rows, grads, _, _ = torch.ops.amtl.lookup_backward(*tables, grad, *bags, *wants)
        found = [*outs, *rows, *grads]
        step = (False, False, False, [], reference.SGD, [0.1, *[0.0] * 4, 1.0])
        learned = [block.clone() for block in blocks]
        torch.ops.amtl.lookup_update_(learned, *tables[1:], grad, *bags, *step)
        found += learned
        learnable = [block.clone().requires_grad_() for block in blocks]
        torch.ops.amtl.lookup(learnable, *lookup[1:]).backward(grad)
        found += [block.grad.to_dense() for block in learnable]
        wanted = wanted or found
        assert all(map(torch.equal, found, wanted)) and len(found) == len(wanted)


def test_there_are_four_operators() -> None:
    assert list(_schema.SCHEMAS) == ["lookup", "lookup_backward", "lookup_update_", "apply_"]
    assert list(reference.IMPLEMENTATIONS) == list(_schema.SCHEMAS)


def test_arguments_have_one_order_in_all_operators() -> None:
    names = [
        [argument.name for argument in getattr(torch.ops.amtl, op).default._schema.arguments]
        for op in _schema.SCHEMAS
    ]
    for some, others in itertools.combinations(names, 2):
        assert [n for n in some if n in others] == [n for n in others if n in some]
