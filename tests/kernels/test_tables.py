"""Several tables in one call equal as many calls side by side."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, Call, Case, build, call, draw_reals, in_order, join
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import _schema, fused, optim, reference

BAGS = 9
TABLES = [
    Case(
        seed=seed, rows=rows, dim=dim, lookups=40, groups=5, bags=BAGS + 1,
        include_last_offset=True, sorted_groups=False, padding=padding, size_dtype=dtype,
        columns=columns, tiers=tiers, hash_seed=8,
    )
    for seed, rows, dim, padding, dtype, columns, tiers in (
        (1, 50, 7, "none", torch.int32, 1, 3),
        (8, 3, 64, "first", torch.int32, 0, 1),
        (4, 200, 1, "none", torch.uint8, 3, 2),
        (23, 20, 40, "last", torch.int32, 4, 3),
    )
]  # fmt: skip
"""Sizes of one and of several columns, narrow and wide. As drawn there are empty bags, lookups past
the last offset, tiers without columns, and in the last table none as wide as its output."""
ROWS = [case.rows for case in TABLES]


def make(
    form: str, device: str = "cpu", *, dtype: torch.dtype | None = None, **changes: Any
) -> Call:
    """A call of all the tables."""
    cases = [replace(case, **changes) for case in TABLES]
    return join(form, [build(case, device, dtype, draw_reals) for case in cases])


def alone(every: Call, t: int) -> Call:
    """What a call asks of one of its tables."""
    tables, bags, count = every.tables, every.bags, len(every.tables["block_counts"])
    each = (bags["offsets"].numel() - 1) // count
    offsets = bags["offsets"][t * each : (t + 1) * each + 1]
    part, weights = slice(int(offsets[0]), int(offsets[-1])), bags["per_sample_weights"]
    first = sum(tables["block_counts"][:t])
    mine = slice(t, t + 1)
    return call(
        tables["blocks"][first : first + tables["block_counts"][t]],
        bags["indices"][part],
        **{name: tables[name][mine] for name in ("dims", "sizes", "row_groups")},
        seed=tables["seed"],
        masks=every.masks[mine],
        offsets=offsets - offsets[0],
        per_sample_weights=None if weights is None else weights[part],
        pooling=bags["pooling"],
        padding_idx=bags["padding_idx"][mine],
        include_last_offset=True,
    )


def gradients(call: Call, out: Tensor) -> list[Tensor]:
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * target.to(out.device, out.dtype)).sum().backward()
    grads = [tensor.grad for tensor in call.learnable]
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
    kinds: dict[str, Any] = {"mean": kind == "mean", "weighted": kind == "weighted"}
    if kind == "mean":
        # Bags that hold a power of two of lookups are longer.
        kinds["lookups"] = 120
    every = make(form, backend.device, dtype=dtype, index_dtype=index_dtype, **kinds)
    every.bags["offsets"] = every.bags["offsets"].long()
    # What is compared is what the operators are asked everywhere else.
    asked = torch.ops.amtl.lookup(*in_order("lookup", every.lookup()))
    assert torch.equal(every.look_up(), asked)
    results = []
    for batched in (True, False):
        mine = every.fresh()
        outs = [alone(mine, t).look_up() for t in range(len(TABLES))]
        results.append(gradients(mine, mine.look_up() if batched else torch.cat(outs, 1)))
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for together, separate in zip(*results, strict=True):
        torch.testing.assert_close(together, separate, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_one_padding_for_all_tables(backend: Any, form: str) -> None:
    call = make(form, backend.device)
    every = call.look_up(padding_idx=[2] * len(TABLES))
    assert torch.equal(call.look_up(padding_idx=2), every)
    assert not torch.equal(call.look_up(padding_idx=None), every)


@pytest.mark.parametrize("form", FORMS)
def test_clamping_stays_within_each_table(backend: Any, form: str) -> None:
    call = make(form, backend.device).fresh()
    indices = call.bags["indices"]
    clamped = indices.clone()
    for t, rows in enumerate(ROWS):
        first = int(call.bags["offsets"][t * BAGS])
        indices[first], indices[first + 1] = rows + 5, -7
        clamped[first], clamped[first + 1] = rows - 1, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = gradients(call, call.look_up(bounds_check="clamp"))
        optimizer = optim.SGD(call.tables["blocks"], lr=0.1)
        call.look_up(fused, optimizer=optimizer, bounds_check="clamp").sum().backward()
    expected = make(form, backend.device).fresh()
    expected.bags["indices"] = clamped
    want = gradients(expected, expected.look_up())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    optimizer = optim.SGD(expected.tables["blocks"], lr=0.1)
    expected.look_up(fused, optimizer=optimizer).sum().backward()
    for a, b in zip(call.tables["blocks"], expected.tables["blocks"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_errors_name_the_table(backend: Any, form: str) -> None:
    call = make(form, backend.device)
    indices, given = call.bags["indices"], call.bags["offsets"]
    first = int(given[BAGS])
    before = int(indices[first + 2])
    indices[first + 2] = 3
    with pytest.raises(IndexError, match=r"table 1: index 3 at position 2 .* a table of 3 rows"):
        call.look_up()
        ak.synchronize()
    indices[first + 2] = before
    for offsets, message in (
        (given[:-1], "offsets must hold 4"),
        (given + 1, r"offsets must start at 0, but offsets\[0\] is 1"),
        (given.index_fill(0, torch.tensor([12], device=backend.device), 0), "decrease"),
        (given.index_fill(0, torch.tensor([36], device=backend.device), 10**6), "end with"),
    ):
        with pytest.raises(ValueError, match=message):
            call.look_up(offsets=offsets)
            ak.synchronize()
    with pytest.raises(ValueError, match="table 1: padding_idx 3"):
        call.look_up(padding_idx=3)
    with pytest.raises(ValueError, match="2 padding_idx for 4 tables"):
        call.look_up(padding_idx=[0, 0])


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
    call.bags["indices"][int(call.bags["offsets"][3 * BAGS])] = 77
    update = call.update("rowwise_adagrad")
    copies = [block.clone() for block in update["blocks"]]
    with pytest.raises(IndexError, match="table 3: index 77 at position 0"):
        torch.ops.amtl.lookup_update_(*in_order("lookup_update_", update))
    assert all(torch.equal(a, b) for a, b in zip(update["blocks"], copies, strict=True))


@pytest.mark.parametrize("form", ["masked", "adaptive"])
def test_a_bad_size_names_the_table(backend: Any, form: str) -> None:
    call = make(form, backend.device)
    call.tables["sizes"][2].fill_(2)
    with pytest.raises(ValueError, match=r"table 2: .*size"):
        call.look_up()
        ak.synchronize()


@pytest.mark.parametrize("form", FORMS)
def test_no_bags_at_all(backend: Any, form: str) -> None:
    call = make(form, backend.device).fresh()
    out = call.look_up(offsets=call.bags["offsets"][:1])
    assert out.shape == (0, sum(case.dim for case in TABLES))
    out.sum().backward()
    assert all(block.grad is not None and not block.grad._nnz() for block in call.tables["blocks"])


@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_change_a_bit(form: str) -> None:
    """Also where one table holds most of the work and is shared by all threads."""
    g = torch.Generator().manual_seed(0)
    call = make(form, weighted=True)
    before = torch.get_num_threads()
    for sizes in ([300] * 4, [9_000, 20, 20, 20]):
        lengths = torch.tensor([n // BAGS for n in sizes]).repeat_interleave(BAGS)
        parts = [
            torch.randint(0, rows, (n // BAGS * BAGS,), generator=g)
            for rows, n in zip(ROWS, sizes, strict=True)
        ]
        call.bags |= {
            "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            "indices": torch.cat(parts),
            "per_sample_weights": torch.randn(sum(map(len, parts)), generator=g),
        }
        results = []
        try:
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                mine = call.fresh()
                found = gradients(mine, mine.look_up())
                optimizer = optim.RowwiseAdagrad(mine.tables["blocks"], lr=0.1)
                mine.look_up(fused, optimizer=optimizer).sum().backward()
                results.append([*found, *mine.tables["blocks"]])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    lookup = make(form, weighted=True).fresh().lookup()
    torch.library.opcheck(torch.ops.amtl.lookup.default, in_order("lookup", lookup))
    plain = make(form, weighted=True)
    backward = in_order("lookup_backward", plain.backward())
    torch.library.opcheck(torch.ops.amtl.lookup_backward.default, backward)
    update = in_order("lookup_update_", plain.update("rowwise_adagrad"))
    torch.library.opcheck(torch.ops.amtl.lookup_update_.default, update)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("form", FORMS)
def test_compile_traces_forward_and_backward(form: str) -> None:
    torch._dynamo.reset()

    def square(call: Call, bounds: str) -> Tensor:
        return call.look_up(bounds_check=bounds).square()

    compiled = torch.compile(square, fullgraph=True)
    for bounds in ("raise", "clamp"):
        results = []
        for run in (compiled, square):
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
    kinds = {"mean": mode == "mean", "weighted": mode == "sum"}
    call = make(form, dtype=torch.float64, **kinds).fresh()
    masks = [mask.detach() for mask in call.masks]
    count = len(call.tables["blocks"])

    def run(*tensors: Tensor) -> Tensor:
        blocks = [Densify.apply(block) for block in tensors[:count]]
        tables = {**call.tables, "blocks": blocks}
        mine = replace(call, tables=tables, masks=masks)
        weights = tensors[count] if len(tensors) > count else None
        return mine.look_up(per_sample_weights=weights)

    with ak.use_backend("reference"):
        inputs = [leaf for leaf in call.learnable if not any(leaf is m for m in call.masks)]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_none_is_an_empty_list(backend: Any) -> None:
    """AOTInductor hands empty lists over as None."""
    blocks = [torch.randn(5, 8, device=backend.device), torch.randn(4, 3, device=backend.device)]
    indices = torch.tensor([1, 7, 1], device=backend.device)
    of = call(blocks, indices, torch.randn(3, 8, device=backend.device))
    few_bits: dict[str, Any] = {"steps": [], "bits": [], "step_ends": []}
    absent = {"dims", "sizes", "row_groups", "masks", *few_bits}
    wanted: list[Tensor] = []
    for several in ([], None):

        def ask(op: str, arguments: dict[str, Any], several: Any = several) -> Any:
            given = {name: several if name in absent else v for name, v in arguments.items()}
            return getattr(torch.ops.amtl, op)(*in_order(op, given))

        outs = [ask("lookup", {**of.lookup(), **more}) for more in ({}, few_bits)]
        rows, grads, _, _ = ask("lookup_backward", of.backward())
        update = of.update("sgd", [0.1, *[0.0] * 4, 1.0])
        ask("lookup_update_", update)
        mine = of.fresh()
        ask("lookup", mine.lookup()).backward(of.grad)
        learned = [block.grad.to_dense() for block in mine.learnable]
        found = [*outs, *rows, *grads, *update["blocks"], *learned]
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
