"""What all tests share.

Memory of ``torch.empty`` is filled with NaN (or the largest integer) before every test's code gets
it, native code's outputs included: PyTorch does that in its deterministic mode. A value that nobody
wrote can't pass for a result. Tests that allocate tables they never touch are marked ``no_poison``.

Layers look for optimizers among all objects of the process, and the garbage collector looks at
them, too: those of the imported modules are taken out of its sight when all tests are collected.

``AMTL_TEST_EVERY=2`` runs about every second case of each test, one at least and always the same
ones, where all of them would take too long; the mark ``every(2)`` does so for one test, unless
``AMTL_SOAK=1`` (``make soak``) asks for all of it.

Inputs that Hypothesis draws may take any time: how long says nothing on a machine that does other
work, too.

``torch.compile`` keeps what it made of a graph by the graph, which says nothing of the Python code
behind an operator's gradient: what was compiled with other code of ours is kept in another folder.
"""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_poison: leaves torch.empty as it is")
    config.addinivalue_line("markers", "every(n): about every n-th case; all with AMTL_SOAK=1")
    settings.register_profile("amtl", deadline=None)
    settings.load_profile("amtl")
    code = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "amtl_kernels").rglob("*.py")):
        code.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"amtl-torchinductor-{code.hexdigest()[:16]}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    of_all = int(os.environ.get("AMTL_TEST_EVERY", "1"))
    soak = os.environ.get("AMTL_SOAK", "0") not in ("", "0")

    def every(item: pytest.Item) -> int:
        mark = item.get_closest_marker("every")
        return of_all if soak or mark is None else of_all * int(mark.args[0])

    # By their names: of cases in turn some value of a parameter would never be among them.
    drawn = {item for item in items if zlib.crc32(item.nodeid.encode()) % every(item) == 0}
    tests = {item.nodeid.partition("[")[0] for item in drawn}
    for item in items:
        if (test := item.nodeid.partition("[")[0]) not in tests:
            tests.add(test)
            drawn.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in drawn])
    items[:] = [item for item in items if item in drawn]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
