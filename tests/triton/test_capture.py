"""What several tables ask of the host and of the GPU, whatever their number.

On fake CUDA tensors, which have no values: code that needs one, or a shape that depends on one,
raises, as it would in the capture of a CUDA graph. Launches are counted, not run.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from kernel_cases import FORMS, RULES, call, in_order, states
from launch_counts import FREE, WAITING

from amtl_kernels.triton import implementations, launch

BAGS, ROWS, GROUPS, LOOKUPS = 6, 50, 5, 5_000
HYPER = [0.1, 1e-3, 0.01, 0.9, 0.99, 1.0]


class Asked(TorchDispatchMode):
    """Notes what PyTorch computes; refuses what only a wait can answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        out = function(*args, **(kwargs or {}))
        assert name not in WAITING, name
        outs = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if t is not None]
        for tensor in (*args, *outs):
            assert not isinstance(tensor, Tensor) or tensor.is_cuda, f"{name} on the host"
        if name not in FREE and function.namespace == "aten":
            self.calls.append(name)
        return out


@contextlib.contextmanager
def capturing() -> Iterator[list[str]]:
    """Collects the kernels launched while a graph is being captured, so to speak."""
    kernels: list[str] = []

    def record(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], _: Mapping) -> None:
        kernels.append(kernel.fn.__name__)

    def refuse(*_: Any) -> None:
        raise RuntimeError("the host waits for the device, or sends it something")

    with (
        mock.patch.object(launch, "recorder", record),
        mock.patch.object(launch, "read", refuse),
        mock.patch.object(launch, "upload", refuse),
        mock.patch.object(torch.cuda, "synchronize", refuse),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        yield kernels


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "device_guard", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_constants", {})
    monkeypatch.setattr(launch, "_captured", {})
    monkeypatch.setattr(Tensor, "data_ptr", lambda _: 1 << 20, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield


def problem(form: str, count: int, kind: str, rule: str | None) -> tuple[str, tuple[Any, ...]]:
    """A backward (no rule) or an update of ``count`` tables, and its arguments."""
    empty = partial(torch.empty, device="cuda")
    dims = [(64, 32)[t % 2] for t in range(count)]
    blocks = [empty(ROWS, dim) for dim in dims]
    described: dict[str, Any] = {}
    if form == "masked":
        described["sizes"] = [empty(ROWS, dtype=torch.uint8) for _ in dims]
    elif form == "adaptive":
        described["row_groups"] = [empty(ROWS, dtype=torch.int32) for _ in dims]
        described["sizes"] = [empty(GROUPS, 4, dtype=torch.int32) for _ in dims]
    else:
        blocks = [empty(ROWS, width) for dim in dims for width in (dim, 8)]
        described["block_counts"] = [2] * count
    of = call(
        blocks,
        empty(LOOKUPS, dtype=torch.int64),
        empty(BAGS, sum(dims)),
        dims=dims,
        seed=7,
        offsets=empty(BAGS * count + 1, dtype=torch.int64),
        per_sample_weights=empty(LOOKUPS) if kind == "weighted" else None,
        pooling=int(kind == "mean"),
        padding_idx=[(-1, 2)[t % 2] for t in range(count)],
        **described,
    )
    if rule is None:
        return "lookup_backward", in_order("lookup_backward", of.backward())
    state = [*states(rule, blocks, empty), empty((), dtype=torch.int64)]
    return "lookup_update_", in_order("lookup_update_", of.update(rule, HYPER, state, blocks))


def upload(values: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Stands in for ``launch.upload``, which fake tensors have no pinned memory for."""
    return torch.empty(len(values), len(values[0]), dtype=torch.int64, device=device)


def warm_up(op: str, arguments: tuple[Any, ...]) -> None:
    """The call before the capture, which may send what describes the tables."""
    with (
        mock.patch.object(launch, "recorder", lambda *_: None),
        mock.patch.object(launch, "upload", upload),
        mock.patch.object(torch.cuda, "synchronize", lambda _: None),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
    ):
        implementations()[op](*arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("rule", RULES)
def test_updates_wait_for_nothing_in_launches_that_do_not_grow(
    form: str, kind: str, rule: str
) -> None:
    found = []
    for count in (2, 26):
        op, arguments = problem(form, count, kind, rule)
        warm_up(op, arguments)
        with capturing() as kernels, Asked() as asked:
            implementations()[op](*arguments)
        found.append((kernels, asked.calls))
    assert found[0] == found[1]
    kernels, calls = found[0]
    assert {"keys_kernel", "reduce_update_kernel", "combine_update_kernel"} < set(kernels)
    more = {"sum": 0, "mean": 2, "weighted": 1}[kind] + (form == "adaptive")
    assert len(kernels) + len(calls) == 7 + more, found[0]


@pytest.mark.parametrize("form", FORMS)
def test_backwards_wait_once_in_launches_that_do_not_grow(form: str) -> None:
    """For the numbers of distinct rows; gradients are described to the kernels after that."""
    found = []
    for count in (2, 26):
        op, arguments = problem(form, count, "weighted", None)
        warm_up(op, arguments)
        read = mock.Mock(side_effect=lambda tensor: [1] * tensor.numel())
        with (
            capturing() as kernels,
            Asked() as asked,
            mock.patch.object(launch, "read", read),
            mock.patch.object(launch, "upload", upload),
        ):
            implementations()[op](*arguments)
        assert read.call_count == 1
        found.append((kernels, asked.calls))
    assert found[0] == found[1]
    assert len(found[0][0]) + len(found[0][1]) <= 14, found[0]


def test_constants_are_there_before_another_stream_reads_them() -> None:
    """The first call waits for them, and for who reads what they push out; later ones do not."""
    done: list[object] = []

    def sent(*arguments: Any) -> Tensor:
        done.append("upload")
        return upload(*arguments)

    device = torch.device("cuda")
    with (
        mock.patch.object(launch, "upload", sent),
        mock.patch.object(launch, "CONSTANTS_KEPT", 2),
        mock.patch.object(torch.cuda, "synchronize", done.append),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
    ):
        first = launch.constant([[1]], device)
        assert launch.constant([[1]], device) is first
        assert done == ["upload", device]
        for value in (2, 3):
            launch.constant([[value]], device)
        assert done == ["upload", device] * 3 and len(launch._constants) == 2
        launch.constant([[4]], device, keep=False)
        assert done == [*["upload", device] * 3, "upload"]


def test_a_wait_is_seen() -> None:
    """What the tests above rely on: each way to wait raises here, for that reason."""
    tensor = torch.empty(3, device="cuda")
    ways = (
        lambda: tensor.sum().item(),
        lambda: tensor.sum().tolist(),
        lambda: torch.ops.aten.nonzero(tensor),
        lambda: tensor.unique(),
        lambda: tensor.unique_consecutive(),
        lambda: torch.equal(tensor, tensor),
        lambda: tensor.masked_select(tensor > 0),
        lambda: tensor.cpu(),
        lambda: bool((tensor > 0).any()),
        lambda: launch.read(tensor),
        lambda: launch.upload([[1]], tensor.device),
        lambda: torch.cuda.synchronize(),
    )
    for way in ways:
        with pytest.raises(Exception) as caught, capturing(), Asked():
            way()
        found = f"{type(caught.value).__name__}: {caught.value}"
        reasons = "DataDependent|DynamicOutput|_unique2|on the host|the host waits"
        assert re.search(reasons, found), found
