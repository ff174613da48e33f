"""Launches through Triton's own launcher and autotuner, with a driver that runs nothing.

The interpreter goes past argument binding, specialisation, compiler options and tuning; this does
not, up to the handing over to the device.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from kernel_cases import Call, applying, call, in_order  # noqa: E402

from amtl_kernels import _schema  # noqa: E402
from amtl_kernels.triton import implementations, launch, lookup  # noqa: E402

pytestmark = pytest.mark.skipif(
    launch.INTERPRETED, reason="the interpreter has no launcher; unset TRITON_INTERPRET"
)


class Driver:
    """Stands in for the CUDA driver: loads anything, notes what is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self.benchmarked = 0
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 228 * 1024},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def run(x: int, y: int, z: int, *_: Any) -> None:
            self.launches.append((metadata.name, (x, y, z)))

        return run

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def bench(call: Callable[[], None], **_: Any) -> list[float]:
            call()
            self.benchmarked += 1
            return [float(self.benchmarked)] * 3

        return bench


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "device_guard", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(lookup._gather, "_tuners", {})
    monkeypatch.setattr(lookup._pooled, "_tuners", {})
    # Nothing ran: one row in one piece, whatever the memory holds.
    monkeypatch.setattr(launch, "read", lambda tensor: [1 << 32 | 1] * tensor.numel())
    config = triton.runtime.driver
    before = config._active
    config.set_active(fake)
    yield fake
    config._active = before


def problem(count: int, rows: int = 100, dim: int = 64) -> Call:
    """``count`` plain lookups in one table with sizes by row."""
    table, sizes = torch.zeros(rows, dim), torch.ones(rows, dtype=torch.uint8)
    return call([table], torch.arange(count) % rows, torch.zeros(count, dim), sizes=[sizes])


def bags_of_groups(count: int, rows: int, seed: int) -> Call:
    """``count`` lookups in two bags of a table with sizes by group."""
    return call(
        [torch.zeros(rows, 64)],
        torch.arange(count) % rows,
        torch.zeros(2, 64),
        sizes=[torch.ones(3, 4, dtype=torch.int32)],
        row_groups=[torch.zeros(rows, dtype=torch.int32)],
        seed=seed,
        offsets=torch.tensor([0, count // 2]),
    )


def run(op: str, arguments: dict[str, Any]) -> Any:
    return implementations()[op](*in_order(op, arguments))


def test_lookups_are_tuned_once_per_key(driver: Driver) -> None:
    run("lookup", problem(130).lookup(0))
    space = len(launch.WIDE_SPACE)
    assert driver.benchmarked == space
    gather_launches = [grid for name, grid in driver.launches if name == "gather_fwd_kernel"]
    # Every choice once to be timed, and the first, which the fake clock favours, for the result.
    assert len(gather_launches) == space + 1
    tile = launch.WIDE_SPACE[0].tile(4, 64)
    assert gather_launches[-1] == (launch.cdiv(130, tile // 64), 1, 1)
    run("lookup", problem(77, rows=30).lookup(2))
    assert driver.benchmarked == space
    run("lookup", problem(77, dim=32).lookup(0))
    assert driver.benchmarked == 2 * space


def test_tuning_can_be_turned_off(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMTL_TRITON_AUTOTUNE", "0")
    run("lookup", problem(64).lookup(0))
    assert driver.benchmarked == 0
    assert len(driver.launches) == 1


def test_other_shapes_of_one_table_are_not_compiled_again(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookups, rows, bags and seeds are run-time values: only D, dtypes and flags are compiled."""
    monkeypatch.setenv("AMTL_TRITON_AUTOTUNE", "0")
    loaded = []
    driver.utils.load_binary = lambda name, *_: loaded.append(name) or (1, 1, 32, 0, 1024)
    shapes = ((16, 48, 16), (33, 50, -3), (1, 160, 2**62), (120, 7, 1))
    for count, rows, seed in shapes:
        mine = bags_of_groups(count, rows, seed)
        run("lookup", mine.lookup(0))
        found, grads, _, _ = run("lookup_backward", mine.backward())
        run("apply_", applying(mine.tables["blocks"], found, grads, "adagrad"))
    assert sorted(loaded) == sorted(set(loaded)), loaded
    assert {"pooled_fwd_kernel", "reduce_rows_kernel", "apply_kernel"} <= set(loaded)
    loaded.clear()
    for count, rows, seed in shapes:
        hyper = [0.1 * count, 1e-8, 0.0, 0.0, 0.0, float(count), 1.0]
        run("lookup_update_", bags_of_groups(count, rows, seed).update("adagrad", hyper))
    assert sorted(loaded) == sorted(set(loaded)), loaded
    assert {"reduce_update_kernel", "combine_update_kernel"} <= set(loaded)


def test_tables_in_one_launch_are_compiled_and_described_once(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bags and lookups are run-time values; what tells the tables apart is uploaded once."""
    uploads = []
    upload = launch.upload
    monkeypatch.setattr(launch, "upload", lambda *a: uploads.append(a) or upload(*a))
    blocks = [torch.zeros(rows, 64) for rows in (30, 7, 500)]
    sizes = [torch.ones(block.shape[0], dtype=torch.uint8) for block in blocks]
    compiled = []
    driver.utils.load_binary = lambda name, *_: compiled.append(name) or (1, 1, 32, 0, 1024)
    for bags, length in ((100, 3), (16, 1), (1, 40)):
        driver.launches.clear()
        indices = torch.zeros(3 * bags * length, dtype=torch.int64)
        offsets = torch.arange(0, indices.numel() + 1, length)
        run("lookup", call(blocks, indices, sizes=sizes, offsets=offsets).lookup(0))
        grid = (launch.cdiv(bags, launch.TILE // 64), 1, 3)
        assert driver.launches == [("pooled_fwd_kernel", grid)]
    assert compiled == ["pooled_fwd_kernel"]
    # The tables as tiers, which a backward reads too, and what lookups know of theirs.
    assert len(uploads) == 2


def test_grids_of_an_update_are_bounded_by_lookups_and_rows(driver: Driver) -> None:
    """The host knows no number of rows or pieces: grids are what these could be at most."""
    for count, rows, most in ((1000, 10_000, 1000), (1000, 10, 10 + 16), (5, 10_000, 5)):
        driver.launches.clear()
        run("lookup_update_", problem(count, rows).update("sgd"))
        grids = dict(driver.launches)
        assert grids["reduce_update_kernel"] == (launch.cdiv(most, 16), 1, 1)
        # One program for each window of 64 lookups but the last.
        assert grids.get("combine_update_kernel", (0,))[0] == launch.cdiv(count, 64) - 1


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        run("lookup", problem(4).lookup())


def test_every_operator_has_a_triton_implementation() -> None:
    assert set(implementations()) == {*_schema.SCHEMAS, "_raise_found"}
