"""Drawn calls of the public lookups against the oracle: every form, option and kind of error.

Values are small integers, and of means the gradients are positive, so that float32 sums are exact
and every result has to be the oracle's, rounded once. Divisions (means, optimizers) leave a few
units in the last place. AMTL_SOAK=1 draws for tens of minutes.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import fused, optim

SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")
INDEX_TYPES = (torch.int64, torch.int32)
RULES = {
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "adam": optim.Adam,
}
FAULTS = (
    "index",
    "size",
    "group",
    "index and size",
    "late offsets",
    "falling offsets",
    "long offsets",
)


@dataclass(frozen=True)
class Case:
    seed: int
    form: str  # masked, adaptive, tiered, codes, rounded
    layout: str  # plain, bags, equal (bags of equal length), tables
    rows: list[int]
    dims: list[int]
    lookups: int
    bags: int
    dtype: torch.dtype
    index_type: torch.dtype
    offset_type: torch.dtype
    size_type: torch.dtype
    include_last: bool
    mean: bool
    weighted: bool
    paddings: list[int | None]
    bounds: str
    gaps: bool  # tensors that are not contiguous
    columns: int
    bits: int
    parts: bool  # of tiers have step sizes
    sparse: bool
    rule: str | None
    fused: bool
    hyper: tuple[float, float, float]  # lr, eps, weight_decay
    steps: int
    expanded: bool  # a gradient of one number
    wanted: tuple[bool, bool, bool]  # gradients of tables, masks, per-sample weights
    fault: str | None
    hash_seed: int


@st.composite
def cases(draw: st.DrawFn, types: tuple[torch.dtype, ...]) -> Case:
    pick = st.sampled_from
    layout = draw(pick(["plain", "bags", "bags", "equal", "tables", "tables"]))
    count = draw(st.integers(1, 3)) if layout == "tables" else 1
    rows = [draw(pick([1, 2, 5, 37, 37, 300, 0])) for _ in range(count)]
    mean = layout != "plain" and draw(st.booleans())
    # Without a check the caller vouches for everything.
    bounds = draw(pick(["raise", "raise", "clamp", "off"])) if all(rows) else "raise"
    form = draw(pick(["masked", "adaptive", "tiered", "codes", "rounded"]))
    every = [None, 0, -1] if draw(st.booleans()) else [None]
    return Case(
        seed=draw(st.integers(0, 2**31)),
        form=form,
        layout=layout,
        rows=rows,
        dims=[draw(pick([1, 2, 3, 4, 8, 12, 16, 17, 33, 70])) for _ in rows],
        lookups=draw(pick([0, 1, 2, 7, 40, 90])),
        bags=draw(pick([0, 1, 2, 9])),
        dtype=draw(pick(types)),
        index_type=draw(pick(INDEX_TYPES)),
        offset_type=draw(pick(INDEX_TYPES)),
        size_type=draw(pick([torch.uint8, torch.int32])),
        include_last=draw(st.booleans()),
        mean=mean,
        weighted=layout != "plain" and not mean and draw(st.booleans()),
        paddings=[draw(pick(every)) if n else None for n in rows],
        bounds=bounds,
        gaps=draw(st.booleans()),
        columns=draw(pick([0, 1, 5])),
        bits=draw(pick([2, 4, 8, 16])),
        parts=draw(st.booleans()),
        sparse=draw(st.booleans()),
        rule=None if form == "codes" else draw(pick([None, *RULES])),
        fused=draw(st.booleans()),
        hyper=(0.125, draw(pick([1e-8, 0.5])), draw(pick([0.0, 0.25]))),
        steps=draw(st.integers(1, 3)),
        expanded=draw(st.booleans()),
        wanted=(draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        fault=None if bounds == "off" else draw(pick([None, None, *FAULTS])),
        hash_seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )


@dataclass
class Call:
    """A case as tensors for the lookups and as numbers for the oracle."""

    case: Case
    device: str
    tables: list[oracle.Table] = field(default_factory=list)
    lookups: list[oracle.Lookups] = field(default_factory=list)
    blocks: list[list[Tensor]] = field(default_factory=list)  # of each table
    ends: list[list[int]] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    row_groups: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    step_ends: list[list[int]] = field(default_factory=list)
    indices: Tensor = field(init=False)
    offsets: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.case.seed)
        for t in range(len(self.case.rows)):
            self._add_table(t)
        self._draw_lookups()

    @property
    def pooled(self) -> bool:
        return self.case.layout != "plain"

    def on(self, values: Any, dtype: torch.dtype, gaps: bool = True) -> Tensor:
        tensor = torch.as_tensor(np.ascontiguousarray(values)).to(dtype)
        if self.case.gaps and gaps and tensor.dim():
            tensor = torch.stack([tensor, tensor], -1)[..., 0]
        return tensor.to(self.device)

    def integers(self, *shape: int) -> oracle.Array:
        return self.random.integers(-4, 5, shape).astype(float)

    def _add_table(self, t: int) -> None:
        case, n, dim = self.case, self.case.rows[t], self.case.dims[t]
        padding = case.paddings[t]
        made = oracle.Table(
            rows=np.zeros((n, dim)),
            kept=[0] * n,
            fine=[True] * n,
            padding=None if padding is None else padding % n,
        )
        self.tables.append(made)
        if case.form in ("tiered", "codes", "rounded"):
            self._add_tiers(made)
            return
        made.rows = self.integers(n, dim)
        spoilt = [i for i in range(n) if i != made.padding and self.random.random() < 0.2]
        small = 0 if case.size_type == torch.uint8 else -2
        bad = [small - 1] if small else [min(dim + 1, 255)]
        if case.form == "masked":
            sizes = self.random.integers(0, dim + 1, n)
            if case.fault in ("size", "index and size"):
                sizes[spoilt] = bad[0]
            made.kept = sizes.tolist()
        else:
            sizes = self._add_groups(made, spoilt, bad[0])
        made.fine = [fine and 0 <= k <= dim for fine, k in zip(made.fine, made.kept, strict=True)]
        made.kept = [k if fine else 0 for fine, k in zip(made.fine, made.kept, strict=True)]
        self.sizes.append(self.on(sizes, case.size_type))
        rows = made.rows.copy()
        if case.form == "masked":
            # What is not kept is never read.
            for i, kept in enumerate(made.kept):
                rows[i, kept:] = self.random.choice([np.nan, np.inf])
        self.blocks.append([self.on(rows, case.dtype, gaps=False)])

    def _add_groups(self, made: oracle.Table, spoilt: list[int], bad: int) -> Any:
        case, n, dim = self.case, len(made.rows), made.dim
        count = int(self.random.integers(1, 6))
        made.group_count = count
        groups = self.random.integers(0, count, n)
        sizes = self.random.integers(0, dim + 1, (count, case.columns or 1))
        if case.fault in ("size", "index and size"):
            # A group of its own: whoever looks it up errs, whatever the column.
            count += 1
            sizes = np.concatenate([sizes, np.full_like(sizes[:1], bad)])
            made.group_count = count
            groups[spoilt] = count - 1
        if case.fault == "group":
            groups[spoilt] = self.random.choice([-1, count, 2**31 - 1])
        for row, group in enumerate(groups.tolist()):
            made.fine[row] = 0 <= group < count
            if made.fine[row]:
                column = oracle.column(row, case.hash_seed, sizes.shape[1])
                made.kept[row] = int(sizes[group, column])
        made.groups = groups.tolist()
        self.row_groups.append(self.on(groups, torch.int32))
        mask_type = self.random.choice([0, 1, 2])
        mask_type = (torch.float32, torch.float16, torch.float64)[mask_type]
        self.masks.append(self.on(self.random.random((count, dim)), mask_type))
        return sizes if case.columns else sizes[:, 0]

    def _add_tiers(self, made: oracle.Table) -> None:
        case, n, dim = self.case, len(made.rows), made.dim
        cuts = np.sort(self.random.integers(0, n + 1, self.random.integers(0, 4))).tolist()
        begins, ends = [0, *cuts], [*cuts, n]
        each = max(1, 8 // case.bits) if case.form == "codes" else 1
        made.rows = np.zeros((n, dim := -(-dim // each) * each))
        blocks, step_ends = [], ends
        if case.parts:
            step_ends = sorted([*ends, *self.random.integers(0, n + 1, 3).tolist()])
        steps = 2.0 ** self.random.integers(-2, 3, len(step_ends))
        of_rows = steps[np.searchsorted(step_ends, np.arange(n), side="right")]
        for begin, end in zip(begins, ends, strict=True):
            width = int(self.random.integers(0, dim // each + 1)) * each
            made.kept[begin:end] = [width] * (end - begin)
            if case.form == "codes":
                stored = self.random.integers(0, 256, (end - begin, width * case.bits // 8))
                if case.bits == 16:
                    # Of codes far from the middle sums would not be exact in float32.
                    stored[:, 1::2] = 128 - stored[:, ::2] // 128
                for row, codes in enumerate(stored.tolist(), begin):
                    made.rows[row, :width] = oracle.numbers(codes, of_rows[row], case.bits)
                blocks.append(self.on(stored, torch.uint8, gaps=False))
            else:
                made.rows[begin:end, :width] = self.integers(end - begin, width)
                stored = made.rows[begin:end, :width]
                blocks.append(self.on(stored, case.dtype, gaps=False))
        if case.form == "rounded":
            made.rounded = oracle.rounded(made.rows, of_rows[:, None], case.bits)
        self.blocks.append(blocks)
        self.ends.append(ends)
        self.steps.append(self.on(steps, torch.float32))
        self.step_ends.append(step_ends)

    def _draw_lookups(self) -> None:
        case, tables = self.case, self.tables
        bags, count = case.bags, len(tables)
        lookups = case.lookups if bags or case.layout != "equal" else 0
        if case.layout == "equal":
            lookups = bags * (lookups // max(bags, 1))
            offsets = np.arange(bags + 1) * (lookups // max(bags, 1))
        else:
            offsets = np.sort(self.random.integers(0, lookups + 1, bags * count + 1))
            offsets[0] = 0
        if not self.pooled:
            offsets = np.arange(lookups + 1)
        elif case.layout == "bags" and not case.include_last:
            # Without bags nothing is looked up.
            offsets[-1] = lookups if bags else 0
        per_table = (len(offsets) - 1) // count
        indices = self.random.integers(0, 300, lookups)
        weights = self.integers(lookups) if case.weighted else None
        for t, table in enumerate(tables):
            mine = slice(int(offsets[t * per_table]), int(offsets[(t + 1) * per_table]))
            if len(table.rows):
                indices[mine] %= len(table.rows)
            begins = offsets[t * per_table : (t + 1) * per_table + 1] - mine.start
            wide = (mine.stop - mine.start) // 3
            if case.fault in ("index", "index and size"):
                wrong = self.random.choice([-1, len(table.rows), 2**31 - 1, -(2**31)], wide)
                indices[mine.start + self.random.integers(0, wide * 3 or 1, wide)] = wrong
            self.lookups.append(
                oracle.Lookups(
                    indices=indices[mine].tolist(),
                    ends=list(zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)),
                    pooled=self.pooled,
                    mean=case.mean,
                    weights=None if weights is None else weights[mine],
                    clamp=case.bounds == "clamp",
                )
            )
        # Nobody looks at what follows the last offset.
        indices[offsets[-1] :] = -7
        shape: tuple[int, ...] = (lookups,)
        if case.layout == "equal":
            shape = (bags, lookups // max(bags, 1))
        elif case.layout == "plain":
            shape = ((lookups,), (1, lookups, 1), (lookups, 1))[case.seed % 3]
        self.last = int(offsets[-1])
        self.indices = self.on(indices.reshape(shape), case.index_type)
        if weights is not None:
            weights[self.last :] = np.nan
            self.weights = self.on(weights.reshape(shape), self.number_type)
        if case.layout in ("bags", "tables"):
            offsets = self._spoilt(offsets)
            whole = case.layout == "tables" or case.include_last
            self.offsets = self.on(offsets if whole else offsets[:-1], case.offset_type)

    def _spoilt(self, offsets: Any) -> Any:
        offsets = offsets.copy()
        fault, at = self.case.fault, len(offsets) // 2
        if fault == "late offsets":
            offsets[0] = 1
        elif fault == "falling offsets":
            offsets[at] = -1
        elif fault == "long offsets":
            offsets[at:] = offsets[-1] + 100
        return offsets

    @property
    def number_type(self) -> torch.dtype:
        """Of outputs and of per-sample weights."""
        return torch.float32 if self.case.form == "codes" else self.case.dtype

    @property
    def parameters(self) -> list[Tensor]:
        return [block for blocks in self.blocks for block in blocks]

    def lookup(self, optimizer: Any = None) -> Tensor:
        """The public function of the case."""
        case, several = self.case, self.case.layout == "tables"
        name = "tiered" if case.form in ("codes", "rounded") else case.form
        name += {"plain": "_embedding", "tables": "_embedding_bag_tables"}.get(
            case.layout, "_embedding_bag"
        )

        def each(values: list[Any]) -> Any:
            return values if several else values[0]

        options: dict[str, Any] = {"padding_idx": each(case.paddings), "bounds_check": case.bounds}
        if self.pooled:
            options["mode"] = "mean" if case.mean else "sum"
            options["per_sample_weights"] = self.weights
        if case.layout in ("bags", "equal"):
            options["include_last_offset"] = case.include_last
        if not several:
            # A dense gradient trains every row.
            options["sparse"] = case.sparse or case.rule is not None
        lookups = (self.indices, self.offsets) if self.pooled else (self.indices,)
        room: Any = ak
        if optimizer is not None:
            room, options["optimizer"] = fused, optimizer
        function = getattr(room, name)
        if case.form in ("tiered", "codes", "rounded"):
            options["embedding_dims" if several else "embedding_dim"] = each(
                [table.dim for table in self.tables]
            )
            if case.form != "tiered":
                options |= {"steps": each(self.steps), "bits": case.bits}
                if case.parts:
                    options["step_ends"] = each(self.step_ends)
            return function(each(self.blocks), each(self.ends), *lookups, **options)
        weights = each([blocks[0] for blocks in self.blocks])
        if case.form == "masked":
            return function(weights, *lookups, each(self.sizes), **options)
        groups = (each(self.row_groups), each(self.sizes), each(self.masks))
        return function(weights, *lookups, *groups, seed=case.hash_seed, **options)

    def gradient(self, out: Tensor) -> tuple[Tensor, list[oracle.Array]]:
        """A drawn gradient of the output, and each table's part of it ``[bags, D]``."""
        lowest = 1 if self.case.mean else -4
        flat = self.random.integers(
            lowest, 5, (out.numel() // max(out.shape[-1], 1), out.shape[-1])
        )
        if self.case.expanded:
            flat[:] = 3
            grad = torch.tensor(3.0, dtype=out.dtype, device=out.device).expand(out.shape)
        else:
            grad = self.on(flat.reshape(out.shape), out.dtype)
        cuts = np.cumsum([table.dim for table in self.tables])[:-1]
        return grad, np.split(flat.astype(float), cuts, axis=1)


def agree(got: Tensor, want: Any, what: str, terms: int = 0, largest: float = 1.0) -> None:
    """Equal after one rounding; or up to ``terms`` more, of numbers up to ``largest``."""
    expected = torch.as_tensor(np.asarray(want)).reshape(got.shape)
    tolerance = (torch.finfo(got.dtype).eps + terms * 2.0**-23) if terms else 0.0
    torch.testing.assert_close(
        got.detach().cpu(),
        expected.to(got.dtype),
        rtol=tolerance,
        atol=tolerance * largest,
        msg=lambda text: f"{what}: {text}",
    )


def check_refused(backend: Any, call: Call) -> bool:
    """Whether something is wrong with the call; then it says so, and what.

    What a GPU finds it tells without knowing whether its one table came in a list, and of all
    tables an index before a size.
    """
    case = call.case
    at_once = backend.late or backend.name == "triton"
    in_list = case.layout == "tables" and not (backend.late and len(call.tables) == 1)
    given = [] if call.offsets is None else call.offsets.tolist()
    if given and not (given[0] == 0 and given == sorted(given) and given[-1] <= call.last):
        with pytest.raises(ValueError, match=r"^offsets must (start at 0|not decrease|end within)"):
            call.lookup()
            ak.synchronize()
        return True
    expected: list[tuple[type[Exception], str]] = []
    for t, (table, lookups) in enumerate(zip(call.tables, call.lookups, strict=True)):
        named = f"table {t}: " if in_list else ""
        bad = oracle.bad_index(table, lookups)
        if bad is not None and (case.bounds == "raise" or not len(table.rows)):
            expected.append(
                (
                    IndexError,
                    f"{named}index {bad[0]} at position {bad[1]} is out of range for a table of "
                    f"{len(table.rows)} rows",
                )
            )
        if oracle.bad_row(table, lookups):
            expected.append((ValueError, named))
        if expected and not at_once:
            break
    if not expected:
        return False
    with pytest.raises((IndexError, ValueError)) as caught:
        call.lookup()
        ak.synchronize()
    told = str(caught.value)
    assert any(
        isinstance(caught.value, kind) and told.startswith(start) for kind, start in expected
    ), (told, expected)
    if caught.type is ValueError:
        assert ("size" in told or "group" in told) and "outside" in told, told
    return True


def check_gradients(call: Call, out: Tensor, wanted: list[Tensor]) -> None:
    case = call.case
    terms = case.lookups if case.mean else 0
    grad, parts = call.gradient(out)
    out.backward(grad)
    ids = {id(tensor) for tensor in wanted}
    for t, (table, lookups) in enumerate(zip(call.tables, call.lookups, strict=True)):
        want = oracle.backward(table, lookups, parts[t])
        start = 0
        for c, block in enumerate(call.blocks[t]):
            mine = {row - start: g for row, g in want.rows.items() if 0 <= row - start < len(block)}
            start += len(block)
            if id(block) not in ids:
                assert block.grad is None
                continue
            assert block.grad is not None
            dense = np.zeros(block.shape)
            for row, g in mine.items():
                dense[row] = g[: block.shape[1]]
            found = block.grad
            if case.layout == "tables" or case.sparse:
                assert found.is_sparse
                assert found._indices()[0].tolist() == sorted(mine)
            agree(found.to_dense(), dense, f"gradient of block {c} of table {t}", terms)
        if case.form == "adaptive" and id(call.masks[t]) in ids:
            found = call.masks[t].grad
            assert found is not None and found.dtype == call.masks[t].dtype
            # Sums of products up to 4 * 4.
            agree(found, want.mask, f"mask gradient of table {t}", terms, 16.0 * case.lookups)
    if call.weights is not None and id(call.weights) in ids:
        every = [oracle.backward(*of) for of in zip(call.tables, call.lookups, parts, strict=True)]
        flat = np.concatenate([one.weights for one in every])
        rest = np.zeros(call.indices.numel() - len(flat))
        assert call.weights.grad is not None
        agree(call.weights.grad, np.concatenate([flat, rest]), "gradient of per-sample weights")


def check_training(call: Call) -> None:
    case = call.case
    lr, eps, decay = case.hyper
    options: dict[str, Any] = {"lr": lr, "weight_decay": decay}
    if case.rule != "sgd":
        options["eps"] = eps
    if case.rule == "adam":
        options["betas"] = (0.75, 0.875)
    assert case.rule is not None
    optimizer = RULES[case.rule](call.parameters, **options)
    rule = oracle.Rule(
        name=case.rule,
        lr=lr,
        eps=eps,
        weight_decay=decay,
        betas=(0.75, 0.875),
        fused=case.fused,
        round_=lambda values: torch.as_tensor(values).to(case.dtype).double().numpy(),
    )
    states = []
    for table in call.tables:
        shape = table.rows.shape[: 1 if case.rule == "rowwise_adagrad" else 2]
        moments = {"sgd": 0, "adam": 2}.get(case.rule, 1)
        states.append([np.zeros(shape) for _ in range(moments)])
    for step in range(1, case.steps + 1):
        optimizer.zero_grad()
        out = call.lookup(optimizer if case.fused else None)
        grad, parts = call.gradient(out)
        out.backward(grad)
        if case.fused:
            assert all(block.grad is None for block in call.parameters)
        optimizer.step()
        for table, lookups, part, state in zip(
            call.tables, call.lookups, parts, states, strict=True
        ):
            oracle.update(rule, table, state, oracle.backward(table, lookups, part).rows, step)
    terms = case.steps * (8 + (case.lookups if case.mean else 0))
    # Decay takes a weight's last unit along into states.
    units = case.steps * torch.finfo(case.dtype).eps * 2**23 if decay else 0
    for t, (table, state) in enumerate(zip(call.tables, states, strict=True)):
        start = 0
        for c, block in enumerate(call.blocks[t]):
            rows, what = slice(start, start + len(block)), f"block {c} of table {t}"
            start += len(block)
            kept = np.zeros(block.shape, bool)
            for i, size in enumerate(table.kept[rows]):
                kept[i, :size] = True
            got = torch.where(torch.as_tensor(kept), block.detach().cpu(), 0)
            want = np.where(kept, table.rows[rows, : block.shape[1]], 0)
            agree(got, want, f"{what} after training", terms, 4.0 * case.steps)
            for name, moment in zip(optimizer._names, state, strict=True):
                found = optimizer.state[block].get(name)
                if found is None:
                    # A plain backward of nothing at all leaves no gradient to step on.
                    assert not moment[rows].any()
                    continue
                expected = moment[rows] if moment.ndim == 1 else moment[rows, : block.shape[1]]
                agree(found, expected, f"{name} of {what}", terms + int(units))


def check(backend: Any, case: Case) -> None:
    call = Call(case, backend.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if check_refused(backend, call):
            return
        if case.rule is not None and case.dtype != torch.float64:
            for block in call.parameters:
                block.requires_grad_()
            check_training(call)
            return
        tables, masks, weights = case.wanted
        tables = tables and case.form != "codes"
        # Several tables of few bits give none.
        weights = weights and not (case.form in ("codes", "rounded") and case.layout == "tables")
        wanted = [
            *(call.parameters if tables else []),
            *(call.masks if masks else []),
            *([call.weights] if weights and call.weights is not None else []),
        ]
        for tensor in wanted:
            tensor.requires_grad_()
        out = call.lookup()
        assert out.dtype == call.number_type
        wants = [oracle.forward(*of) for of in zip(call.tables, call.lookups, strict=True)]
        agree(out, np.concatenate(wants, 1), "output", 4 if case.mean else 0)
        if wanted:
            check_gradients(call, out, wanted)


def test_drawn_calls(backend: Any) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16)
    if os.environ.get("TRITON_INTERPRET") == "1":
        # It cuts a bfloat16 off where a GPU rounds it.
        types = types[:2]
    if backend.name == "reference":
        types = (*types, torch.float64)

    # An interpreter needs seconds for a call.
    brief = 6 * backend.examples if backend.max_lookups >= 300 else 4

    @settings(
        deadline=None,
        max_examples=2000 * backend.examples if SOAK else brief,
        # Shrinking takes minutes under an interpreter.
        phases=list(Phase) if SOAK else [Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(types))
    def run(case: Case) -> None:
        check(backend, case)

    run()
