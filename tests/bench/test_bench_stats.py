from __future__ import annotations

import numpy as np
import pytest

from bench.stats import Ratio, Summary, change_between, paired_ratio, verdict


def test_summary_is_median_and_middle_eighty_percent() -> None:
    summary = Summary.of(range(101))
    assert (summary.median, summary.p10, summary.p90, summary.count) == (50, 10, 90, 101)


def test_paired_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    hits, trials = 0, 300
    for trial in range(trials):
        drift = np.exp(np.cumsum(generator.normal(0, 0.15, 40)))
        against = drift * generator.lognormal(0, 0.05, 40)
        of = 0.5 * drift * generator.lognormal(0, 0.05, 40)
        ratio = paired_ratio(of, against, resamples=400, seed=trial)
        hits += ratio.low <= 0.5 <= ratio.high
    assert 0.90 <= hits / trials <= 0.99


def test_pairing_cancels_a_machine_that_slows_down() -> None:
    generator = np.random.default_rng(6)
    drift = np.exp(np.linspace(0, 3, 60))
    of = 2 * drift * generator.lognormal(0, 0.02, 60)
    against = drift * generator.lognormal(0, 0.02, 60)
    ratio = paired_ratio(of, against)
    assert ratio.high - ratio.low < 0.1
    assert ratio.low < 2 < ratio.high
    loose = change_between(against, of)
    assert loose.high - loose.low > 5 * (ratio.high - ratio.low)


def test_rounds_must_pair_up() -> None:
    with pytest.raises(ValueError, match="pair up"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="pair up"):
        paired_ratio([], [])


def test_inverse_swaps_the_ends() -> None:
    inverse = Ratio(0.5, 0.25, 0.8).inverse()
    assert (inverse.value, inverse.low, inverse.high) == (2.0, 1.25, 4.0)


def test_verdict_needs_the_whole_interval() -> None:
    assert verdict(Ratio(1.2, 1.1, 1.3)) == "slower"
    assert verdict(Ratio(1.2, 1.04, 1.3)) == "same"
    assert verdict(Ratio(0.8, 0.7, 0.9)) == "faster"
    assert verdict(Ratio(0.8, 0.7, 0.96)) == "same"
