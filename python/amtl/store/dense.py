"""What a run holds beside its table, in as few bytes as hold its numbers exactly.

A trained model is rounded first, where that loses nothing (`amtl.run.learner.Learner.round_dense`);
then a row of a matrix is -127..127 times one step, or a number is one of 16 bits, and the file
holds it so.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 127
"""The largest code of 8 bits."""

_DROPPED = (1 << 8) - 1
"""Bits of a step that are zero, so that up to 127 times it is a float32 again, exactly."""


def to_halves(values: Tensor) -> Tensor:
    """Numbers of 32 bits, rounded to such as 16 bits hold."""
    return values.to(torch.float16).to(values.dtype)


def to_bytes(values: Tensor) -> Tensor:
    """A float32 matrix, each row rounded to what 8 bits and a step of its own hold.

    Whatever is no matrix, as `to_halves`. The largest number of a row is 127 steps.
    """
    if values.dim() != 2:
        return to_halves(values)
    steps = values.abs().amax(1, keepdim=True) / _MOST
    steps = (steps.view(torch.int32) + _DROPPED & ~_DROPPED).view(torch.float32)
    codes = (values / steps).round_()
    # A row of zeros has a step of zero.
    return torch.where(steps > 0, codes * steps, values)


def pack(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Numbers as they are stored, and the steps `[n]` of codes, if they are codes.

    Returns:
        int8 codes `[n, m]` with float32 steps, or float16, where these hold a float32 tensor
        exactly; else the tensor.
    """
    if values.dtype != torch.float32 or not values.numel():
        return values, None
    if values.dim() == 2:
        steps = values.abs().amax(1) / _MOST
        codes = (values / steps[:, None]).nan_to_num_().round_().clamp_(-_MOST, _MOST)
        codes = codes.to(torch.int8)
        if torch.equal(unpack(codes, steps), values):
            return codes, steps
    halves = values.to(torch.float16)
    return (halves if torch.equal(halves.to(torch.float32), values) else values), None


def unpack(codes: Tensor, steps: Tensor) -> Tensor:
    """The numbers of codes `[n, m]` and steps `[n]`.

    Raises:
        ValueError: they do not belong together.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8 or steps.shape != codes.shape[:1]:
        raise ValueError(f"codes {list(codes.shape)} with steps {list(steps.shape)}")
    return codes.to(torch.float32) * steps.to(torch.float32)[:, None]
