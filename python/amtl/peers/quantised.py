"""Numbers of few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amtl.layer.rounding import PART_BYTES, step_groups
from amtl.peers.base import DoesNotFit, Facts, Part, Peer, SearchingPeer, choices_in_budget

_LEAST_STEP = 1e-10


def rounded(values: Tensor, step: Tensor, bits: int, offset: Tensor | float = 0.0) -> Tensor:
    """Values as codes of `bits` bits stand for them, as LSQ trains (arXiv 1902.08153, section 2).

    `step * clamp(round((v - offset) / step), -2^(b-1), 2^(b-1) - 1) + offset`. Gradients pass
    straight through the rounding, and so those of step and offset are LSQ's (and LSQ+'s).

    Args:
        values: of any shape.
        step: above 0, broadcasts.
        bits: at least 1.
        offset: broadcasts.
    """
    level = ((values - offset) / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (level + (level.round() - level).detach()) * step + offset


class PostTraining(SearchingPeer):
    """Rounding after training, with one step size for each field and binary order of the count.

    Each step size has the least squared error of those tried; nothing trains after it. With
    rounding in training instead, see `--method fixed --bits 4`.

    Args:
        facts: see `Peer`.
        bits: of a number; the widest rows that fit are trained.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": (4, 8, 2)}
    plain_search = True
    keeps_model = True
    goes_on = True
    trains_again = False
    group: Tensor
    steps: Tensor

    def __init__(self, facts: Facts, bits: int = 4) -> None:
        super().__init__(facts)
        self.bits = bits
        key = step_groups(facts.counts, facts.fields)
        groups, group = torch.unique(key, return_inverse=True)
        self.width = facts.widest(bits, beside=len(groups) * PART_BYTES)
        if not self.width:
            raise DoesNotFit(f"{bits} bits a row take more than {facts.budget:,} bytes")
        self.weight = self.row_table(facts.rows, self.width)
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("steps", torch.ones(len(groups)))

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        return self.padded(self.look_up(self.weight, rows))

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return [
            Part(self.facts.rows * self.width, self.bits),
            Part(len(self.steps), 8 * PART_BYTES),  # step sizes and their ends
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return torch.full((self.facts.rows,), self.bits * self.width)

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        for g in range(len(self.steps)):
            rows = self.group == g
            step, self.weight[rows] = best_rounding(found.weight[rows], self.bits)
            self.steps[g] = step


def best_rounding(values: Tensor, bits: int) -> tuple[float, Tensor]:
    """The step size of least squared error, of 80 tried, and the values rounded with it.

    Levels lie evenly on both sides of zero, as the product's do.
    """
    top = float(values.abs().max()) if values.numel() else 0.0
    if top == 0.0:
        return 1.0, values.clone()
    best, least, half = (1.0, values), math.inf, (2**bits - 1) / 2
    for share in torch.linspace(0.05, 1.0, 80).tolist():
        step = max(share * top / half, _LEAST_STEP)
        levels = ((values / step + half).round().clamp(0, 2 * half) - half) * step
        error = float((levels - values).square().sum())
        if error < least:
            best, least = (step, levels), error
    return best


class Mpe(SearchingPeer):
    """MPE, Li et al. 2024 (arXiv 2409.20305), sections 3.2 to 3.4: bits by frequency group.

    Rows of all fields, ordered by count, are cut into groups of equal size. The search shows each
    row as the mean of itself at 0 to 6 bits, weighed by its group's `softmax(gamma / tau)`, and
    adds `decay * sum_g sum_b p_gb b / c_g`, c_g being the group's lookups over the least group's.
    A step size for each number of bits and an offset for each column are trained as in LSQ+. Then
    each group takes the most bits with a probability of at least half an equal share, and the
    table trains again from its initial values, all else from where it was.

    The bits so found meet no budget. They are moved to the largest that does by
    `gamma_b - c * b / c_g` with one c for all groups, as another decay would: frequent groups keep
    theirs longest. gamma learns a tenth as fast as
    `mask_lr` says, the paper's rate. As the paper, it forgets `c_g` of groups without lookups: 1.

    Args:
        facts: see `Peer`.
        decay: weight of the bits in the loss.
        groups: how many; the paper has 128.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "decay": (3e-4, 3e-5, 3e-3),
        "groups": (128, 32),
    }
    BITS: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4, 5, 6)
    _TAU = 3e-3
    _SLOWER = 0.1
    group: Tensor
    bits: Tensor

    def __init__(self, facts: Facts, decay: float = 3e-4, groups: int = 128) -> None:
        super().__init__(facts)
        self.decay = decay
        groups = min(groups, facts.rows)
        order = torch.argsort(facts.counts, descending=True, stable=True)
        group = torch.empty(facts.rows, dtype=torch.int64)
        group[order] = torch.arange(facts.rows) * groups // facts.rows
        lookups = torch.bincount(group, weights=facts.counts.double(), minlength=groups)
        least = lookups[lookups > 0].min() if bool((lookups > 0).any()) else lookups.new_ones(())
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("share", (lookups / least).clamp(min=1.0).float(), persistent=False)
        self.register_buffer("sizes", torch.bincount(group, minlength=groups), persistent=False)
        self.register_buffer("bits", torch.full((groups,), -1))
        self.weight = self.row_table(facts.rows, facts.dim)
        self.gamma = nn.Parameter(torch.zeros(groups, len(self.BITS)))
        levels = 2.0 ** (torch.tensor(self.BITS[1:]) - 1)
        start = 2 * self.weight.detach().abs().mean() / levels.sqrt()
        self.steps = nn.Parameter(start)
        self.offset = nn.Parameter(torch.zeros(facts.dim))

    def probabilities(self) -> Tensor:
        """Of each number of bits for each group, `[G, 7]`."""
        return torch.softmax(self.gamma * (self._SLOWER / self._TAU), 1)

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        values, groups = self.look_up(self.weight, rows), self.group[rows]
        searching = self.phase == "search"
        weights = self.probabilities()[groups] if searching else None
        out = torch.zeros_like(values)
        for b, step in zip(self.BITS[1:], self.steps.abs() + _LEAST_STEP, strict=True):
            if weights is not None:
                out = out + weights[:, b : b + 1] * rounded(values, step, b, self.offset)
                continue
            here = (self.bits[groups] == b).nonzero().squeeze(1)
            if len(here):
                out = out.index_copy(0, here, rounded(values[here], step, b, self.offset))
        return out

    def penalty(self) -> Tensor:
        """See `SearchingPeer`."""
        expected = self.probabilities() @ torch.tensor(self.BITS, dtype=torch.float32)
        return self.decay * (expected / self.get_buffer("share")).sum()

    def mask_parameters(self) -> list[nn.Parameter]:
        """See `Peer`."""
        fixed = [] if self.phase == "frozen" else [self.gamma]
        return [*fixed, self.steps, self.offset]

    keeps_model = True

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        self.steps.copy_(found.steps)
        self.offset.copy_(found.offset)
        self.gamma.copy_(found.gamma)
        spare = self.facts.budget - self._beside()
        if spare < 0:
            raise DoesNotFit(f"step sizes alone take more than {self.facts.budget:,} bytes")
        costs = (self.get_buffer("sizes") * self.dim)[:, None] * torch.arange(len(self.BITS))
        scores = found.gamma * self.get_buffer("share")[:, None]
        self.bits.copy_(choices_in_budget(scores, costs, 8 * spare))

    def _beside(self) -> int:
        return 4 * len(self.steps) + 4 * self.dim + 8 * len(self.BITS)

    def parts(self) -> list[Part]:
        """See `Peer`."""
        bits = self.bits if bool(self.settled) else torch.full_like(self.bits, self.BITS[-1])
        total = int((bits * self.get_buffer("sizes")).sum()) * self.dim
        return [
            Part(total, 1),
            Part(len(self.steps), 32),
            Part(self.dim, 32),  # offsets
            Part(len(self.BITS), 64),  # ends of rows of equal bits
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return self.bits[self.group] * self.dim


class Alpt(Peer):
    """ALPT, Li et al. 2022 (arXiv 2212.05735), section 3: integers all through training.

    The table holds codes times step sizes; after each update they are rounded again, up or down
    at random so that the mean is kept (equation 4). Step sizes learn.

    A step size for each field instead of each value, which at this width would take as much as two
    bits a number. They learn from the same pass as the table, by how the shown values change with
    them, codes fixed; the paper takes a second pass.

    Args:
        facts: see `Peer`.
        bits: of a number; rows are the widest that fit, zeros beyond.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": (8, 4, 2)}

    def __init__(self, facts: Facts, bits: int = 8) -> None:
        super().__init__(facts)
        self.bits = bits
        fields = len(facts.field_sizes)
        self.width = facts.widest(bits, beside=4 * fields)
        if not self.width:
            raise DoesNotFit(f"{bits} bits a row take more than {facts.budget:,} bytes")
        self.weight = self.row_table(facts.rows, self.width)
        step = float(2 * self.weight.detach().abs().mean() / 2 ** ((bits - 1) / 2))
        self.steps = nn.Parameter(torch.full((fields,), step))
        self.register_buffer("fields", facts.fields, persistent=False)
        self.after_step()

    def _row_steps(self) -> Tensor:
        return (self.steps.abs() + _LEAST_STEP)[self.get_buffer("fields")][:, None]

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        values, step = self.look_up(self.weight, rows), self._row_steps()[rows]
        codes = (values / step).detach()
        return self.padded(values + codes * (step - step.detach()))

    @torch.no_grad()
    def after_step(self) -> None:
        """Round to codes, up or down at random."""
        step = self._row_steps()
        dice = torch.rand(self.weight.shape)
        half = 2 ** (self.bits - 1)
        self.weight.copy_((self.weight / step + dice).floor_().clamp_(-half, half - 1).mul_(step))

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return [
            Part(self.weight.numel(), self.bits),
            Part(len(self.steps), 32),
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return torch.full((self.facts.rows,), self.bits * self.width)
