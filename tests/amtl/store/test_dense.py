"""What a run holds beside its table: rounded, and stored in as few bytes as hold it exactly."""

from __future__ import annotations

import pytest
import torch
from amtl.store.dense import pack, to_bytes, to_halves, unpack
from hypothesis import given
from hypothesis import strategies as st


def drawn(seed: int, rows: int = 7, columns: int = 33) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-12, 12, (rows, 1), generator=g)
    return torch.randn(rows, columns, generator=g) * scale


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9))
def test_what_is_rounded_to_bytes_is_stored_in_them_exactly(seed, rows, columns):
    values = drawn(seed, rows, columns)
    values[0] = 0
    rounded = to_bytes(values)
    codes, steps = pack(rounded)
    assert codes.dtype == torch.int8 and codes.shape == values.shape
    assert steps is not None and steps.shape == (rows,)
    assert torch.equal(unpack(codes, steps), rounded)
    # Half a step, which is at most a little more than the largest number over 127.
    bound = values.abs().amax(1, keepdim=True) / 127 * 0.5001
    assert ((rounded - values).abs() <= bound).all()
    assert torch.equal(to_bytes(rounded), rounded)


def test_the_rest_is_stored_in_16_bits_or_as_it_is():
    values = drawn(1)
    assert pack(values)[0] is values
    halves = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).half().float()
    stored, steps = pack(halves)
    assert stored.dtype == torch.float16 and steps is None
    assert torch.equal(stored.float(), halves)
    vector = to_bytes(values[0])
    assert torch.equal(vector, to_halves(values[0]))
    for other in (torch.zeros(0, 3), torch.randn(3, 3).double(), torch.arange(4)):
        assert pack(other)[0] is other


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e38, 1e-45])
def test_odd_numbers_come_back_as_they_are(odd):
    values = drawn(3, 2, 5).abs().clamp(0.1, 1)
    values[1, 2] = odd
    for given_values in (values, to_bytes(values)):
        stored, steps = pack(given_values)
        found = stored.float() if steps is None else unpack(stored, steps)
        torch.testing.assert_close(found, given_values, rtol=0, atol=0, equal_nan=True)


def test_codes_and_steps_have_to_fit():
    codes = torch.zeros(2, 3, dtype=torch.int8)
    for wrong in (
        (codes, torch.ones(3)),
        (codes[0], torch.ones(3)),
        (codes.float(), torch.ones(2)),
    ):
        with pytest.raises(ValueError, match="with steps"):
            unpack(*wrong)
