"""What the CUDA operators put on the stream: how much, what waits, when bad input is told of."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Call, Case, build, call, join

from amtl_kernels import _arguments, reference

from . import simulator as sim
from .calls import run
from .test_errors import KINDS, Kind, outcome, put, values

ROWWISE = ("rowwise_adagrad", [0.1, 1e-8, 0.0, 0.0, 0.0, 1.0])


def uses(of: Any) -> list[str]:
    """What a call puts on the stream, in order: kernels by name, and the library's calls."""
    sim.tools.take_stream_uses()
    of()
    found = [use.removeprefix("a ") for use in sim.tools.take_stream_uses()]
    return [re.sub(r"[( ]*(\w+).*", r"\1", use) for use in found]


def test_a_search_step_is_ten_operations_and_no_wait() -> None:
    """With as many levels of partial sums as 65,536 bags of twenty have, checked as by default."""
    lookups = 64 * 4_100
    case = Case(rows=2_000, dim=4, lookups=lookups, groups=50, columns=1, bags=lookups // 2)
    of = build(case).call("adaptive", True, offsets=torch.arange(0, lookups, 2))
    update = of.update(*ROWWISE)

    def one() -> None:
        run("lookup", of.lookup(bounds_check=1))
        run("lookup_update_", update)

    with sim.simulation(watch_bounds=False):
        found = uses(one)
    levels = ["reduce_both_kernel"] * 4
    assert found == [
        *("memset", "pool_short_kernel", "check_kernel"),
        *("lookup_keys_kernel", "sort", "reduce_lookups_kernel", *levels),
    ]


def many_tables(dims: list[int], form: str, means: bool) -> Callable[[], None]:
    """A checked lookup of bags of one and its step; frozen tables have two tiers, others groups."""
    frozen = form == "frozen"
    rows, groups, tables = 200, 20, len(dims)
    batch = 1_300 // tables
    g = torch.Generator().manual_seed(7)
    rising = torch.arange(rows, dtype=torch.int32) * groups // rows
    described: dict[str, Any] = {
        "sizes": [torch.full((groups, 1), d - 1, dtype=torch.int32) for d in dims],
        "row_groups": [rising.flip(0) if form == "falling" else rising] * tables,
        "groups_sorted": form == "search",
    }
    shapes = [(rows, d) for d in dims]
    if frozen:
        described = {"dims": dims, "block_counts": [2] * tables}
        shapes = [shape for d in dims for shape in ((rows // 4, d), (rows - rows // 4, d // 2))]
    blocks = [torch.randn(*shape, generator=g) for shape in shapes]
    of = call(
        blocks,
        (torch.rand(tables * batch, generator=g) ** 4 * rows).long(),
        torch.randn(batch, sum(dims), generator=g),
        offsets=torch.arange(tables * batch + 1),
        pooling=int(means),
        padding_idx=[3 if means else -1] * tables,
        **described,
    )
    state = [torch.ones(len(block)) for block in blocks]

    def one() -> None:
        run("lookup", of.lookup(bounds_check=1))
        run("lookup_update_", of.update(*ROWWISE, state, blocks))

    return one


@pytest.mark.parametrize("means", [False, True], ids=["sums", "means with padding"])
@pytest.mark.parametrize("form", ["search", "falling", "frozen"])
@pytest.mark.parametrize("dims", [[4] * 26, [4, 8] * 13], ids=["one width", "mixed widths"])
def test_a_step_of_many_tables_is_twelve_operations_at_most(
    dims: list[int], form: str, means: bool
) -> None:
    """Whatever their widths and the order of groups: masks are not cleared apart.

    More lookups have more levels of partial sums: two here, four up to 4.2 million.
    """
    with sim.simulation(watch_bounds=False):
        found = uses(many_tables(dims, form, means))
    shares = ["bag_share_kernel"] if means else []
    assert found == [
        *("upload_kernel", "pool_short_kernel", "check_kernel", "upload_kernel", *shares),
        *("lookup_keys_kernel", "sort", "reduce_lookups_kernel", *["reduce_both_kernel"] * 2),
    ]
    assert len(found) + 2 <= 12


def two_tables(falls: bool) -> Call:
    """In groups."""
    of_both = {"lookups": 200, "bags": 101, "include_last_offset": True, "columns": 1}
    of_both |= {"size_dtype": torch.uint8}
    shapes = {"rows": 90, "dim": 8, "groups": 9}, {"rows": 60, "dim": 4, "groups": 3}
    tables = [build(Case(**shape, **of_both)) for shape in shapes]
    if falls:
        for table in tables:
            table.row_group = table.row_group.flip(0)
    return join("adaptive", tables)


@pytest.mark.parametrize("wanted", ["rows and masks", "masks", "step"])
@pytest.mark.parametrize("falls", [False, True], ids=["rise", "fall"])
def test_several_tables_with_masks_sort_once(wanted: str, falls: bool) -> None:
    """And read the gradient once, whether groups rise along the rows or not.

    Row gradients come in the order of rows: where groups fall, their lookups are sorted again.
    """
    of = two_tables(falls)
    of.groups_sorted = not falls
    if wanted == "step":
        arguments = of.update("sgd")
        found = uses(lambda: run("lookup_update_", arguments))
    else:
        arguments = of.backward() | {"weight_grad": wanted != "masks"}
        found = uses(lambda: run("lookup_backward", arguments))
    assert found.count("sort") == (2 if falls and wanted == "rows and masks" else 1)
    assert found.count("reduce_lookups_kernel") == 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] != "lookup_backward"], ids=" ".join)
def test_only_row_gradients_are_waited_for(kind: Kind) -> None:
    found = uses(lambda: outcome(sim.IMPLEMENTATIONS[kind[0]], kind, {}))
    assert found and "wait" not in found
    uploads = found.count("upload_kernel")
    assert uploads == (kind[2] == "tables"), found
    if kind[0] == "lookup":
        # What is uploaded brings along a clear report.
        assert len(found) == 3 and found.count("memset") == 1 - uploads, found


@pytest.mark.parametrize("form", ["masked", "adaptive", "tiered"])
def test_row_gradients_are_waited_for_once_and_not_in_a_capture(form: str) -> None:
    kind = ("lookup_backward", form, "bags")
    operator = sim.IMPLEMENTATIONS[kind[0]]
    assert uses(lambda: outcome(operator, kind, {})).count("wait") == 1
    with sim.simulation(capturing=True):
        refused = outcome(operator, kind, {})
        assert refused[0] == "RuntimeError" and "how many distinct rows" in refused[1]
        # Nobody asks for rows: nothing to wait for.
        assert outcome(operator, kind, {"weight_grad": False}) == ("accepted", "")


def lookup(kind: str, changes: dict[str, Any], bounds_check: int = 1) -> None:
    given = values(kind, "bags") | {"bounds_check": bounds_check}
    for name, change in changes.items():
        given[name] = change(given[name])
    names = [a.name for a in torch.ops.amtl.lookup.default._schema.arguments]
    sim.IMPLEMENTATIONS["lookup"](*(given[name] for name in names))


BAD = {"indices": put(1, 77)}


@pytest.mark.parametrize("op", ["lookup", "lookup_backward", "lookup_update_", "apply_"])
def test_every_later_call_tells_of_bad_input(op: str) -> None:
    """Before it does anything: an update that follows a bad lookup changes nothing."""
    lookup("masked", BAD)
    kind = (op, "tiered", "bags")
    given = values("tiered", "bags")
    names = [a.name for a in getattr(torch.ops.amtl, op).default._schema.arguments]
    before = [tensor.clone() for tensor in (*given["blocks"], *given["state"])]
    with pytest.raises(IndexError, match=r"index 77 at position 1 .* of 6 rows") as caught:
        sim.IMPLEMENTATIONS[op](*(given[name] for name in names))
    assert str(caught.value).endswith(f"\n{_arguments.FOUND_BEFORE}")
    after = [*given["blocks"], *given["state"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # Told once.
    assert outcome(sim.IMPLEMENTATIONS[op], kind, {}) == ("accepted", "")


def test_a_captured_lookup_is_checked() -> None:
    lookup("masked", {})
    with sim.simulation(capturing=True):
        lookup("masked", BAD)
    with pytest.raises(IndexError, match="index 77"):
        sim.raise_found()


def test_a_clamped_index_is_told_of_by_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_warned_clamped", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lookup("masked", BAD, bounds_check=2)
    with pytest.warns(RuntimeWarning, match="index 77 at position 1 .* was clamped"):
        lookup("masked", {})


def test_the_first_checked_lookup_is_not_captured() -> None:
    """Memory of the host is taken then, which a capture forbids: said, and mended by a warm-up."""
    program = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from hostsim.test_streams import lookup
from hostsim import simulator as sim
with sim.simulation(capturing=True):
    try:
        lookup("masked", {})
    except RuntimeError as error:
        print(error)
lookup("masked", {})
with sim.simulation(capturing=True):
    lookup("masked", {})
print("fine")
"""
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program, tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, fine = done.stdout.splitlines()
    assert "call a lookup once before the first capture" in said and fine == "fine"
