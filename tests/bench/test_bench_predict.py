"""What is predicted of a GPU that is not here, and that the prediction can fail."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bench import predict
from bench.predict import H100

ROOT = Path(__file__).resolve().parents[2]


def test_bags_of_one_reach_seventy_percent_of_the_copy_rate(simulator: None) -> None:
    found = predict.predictions()
    assert min(each.least for each in found) >= predict.GOAL
    assert [each.rounds for each in found] == [8, 6]
    assert {each.threads for each in found} == {1024}
    # The page has what the command prints.
    assert predict.text(found) in (ROOT / "docs" / "gpu.md").read_text()
    for each in found:
        # Loads that take longer than is said there would not do.
        slow = each.longest_load(predict.GOAL) / predict.LATENCY
        for factor, reaches in ((0.99, True), (1.01, False)):
            slower = dataclasses.replace(each, latency=each.latency * slow * factor)
            assert (slower.least >= predict.GOAL) == reaches
        assert each.share(each.floor) < each.share(each.floor, overlaps=True) < 1


def test_a_warp_that_waits_for_each_row_would_not_reach_it(
    simulator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "IN_FLIGHT", 1)
    assert min(each.least for each in predict.predictions()) < predict.GOAL


@pytest.mark.parametrize(
    ("registers", "shared", "threads"),
    [(56, 9216, 1024), (64, 0, 1024), (65, 0, 768), (80, 0, 768), (128, 0, 512), (32, 60_000, 768)],
)
def test_threads_that_a_multiprocessor_holds(registers: int, shared: int, threads: int) -> None:
    assert H100.resident_threads(registers, shared) == threads


def test_it_knows_the_kernels_as_they_are() -> None:
    source = (ROOT / "csrc" / "kernels" / "pool.cuh").read_text()
    short = source[source.index("pool_short_kernel") :]
    assert re.search(r"kUnroll = (\d+);", short)[1] == str(predict.IN_FLIGHT)  # type: ignore[index]
    platform = (ROOT / "csrc" / "kernels" / "platform.cuh").read_text()
    assert f"kBlockThreads = {predict.BLOCK};" in platform
