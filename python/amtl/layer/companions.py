"""Size heads of several layers, solved for together.

What the head of one small table does in a step are some hundred small operations, whose number is
their cost. Heads that are alike, as those of a converted model are, do each of them once for all.
Every head keeps its parameter, its groups and its budget, and finds what it would find by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from amtl.layer.replicas import are_several
from amtl.layer.size_head import Padded, SizeHead, Solution

_FEWER = 8
"""Times: heads of so many fewer groups than the largest are not padded to its."""


def accompany(heads: Iterable[SizeHead]) -> None:
    """Let heads that are alike be solved for together from now on; others stay by themselves."""
    alike: dict[tuple[object, ...], list[list[SizeHead]]] = {}
    for head in sorted(heads, key=lambda head: -head.num_groups):
        if head.trains:
            groups = alike.setdefault(head.likeness(), [[head]])
            if head.num_groups * _FEWER < groups[-1][0].num_groups:
                groups.append([head])
            elif head is not groups[-1][0]:
                groups[-1].append(head)
    for found in (group for groups in alike.values() for group in groups):
        companies = {id(head.companions) for head in found}
        if len(found) > 1 and (len(companies) > 1 or found[0].companions is None):
            company = Company()
            for head in found:
                company.add(head)


@dataclass
class _Solved:
    """Several heads as they were solved for.

    Attributes:
        heads: weak references to them.
        head: what knows what is alike in them: no member of the company, of which nothing may be
            held by a graph that the company holds.
        padded: their groups.
        numbers: [L, P], their parameters as they were.
        scores: [L, G] or [L, G, M]; on a GPU they lead back to the numbers where gradients were
            wanted.
        whole: the solution, with L in front.
        parts: that of each head.
        places: of each part, by its id.
    """

    heads: list[weakref.ref[SizeHead]]
    head: SizeHead
    padded: Padded
    numbers: Tensor
    scores: Tensor
    whole: Solution
    parts: list[Solution]
    places: dict[int, int]

    def gradient(self, of_masks: Sequence[Tensor | None]) -> Tensor:
        """Gradient of the numbers, [L, P], from those of the soft masks, [G, D] of each head."""
        head, padded, scores, numbers = self.head, self.padded, self.scores, self.numbers
        wanted = _stacked(of_masks, scores.new_zeros(()).expand(scores.shape[1], head.grid.dim))
        with _exact(head):
            found = head._pull(scores.detach(), numbers, self.whole, padded, wanted)
            if found is not None:
                return found
            with torch.enable_grad():
                if not scores.requires_grad:
                    numbers = numbers.detach().requires_grad_()
                    scores = head.scores(padded, numbers)
                mask = head._mask(scores, self.whole, padded)
        return torch.autograd.grad(mask, numbers, wanted, retain_graph=True)[0]


class Company:
    """`amtl.layer.size_head.Companions`."""

    def __init__(self) -> None:
        self._heads: list[weakref.ref[SizeHead]] = []
        self._padded: tuple[list[weakref.ref[SizeHead]], Padded] | None = None
        self._solved: _Solved | None = None
        self._masks: tuple[list[bool], tuple[Tensor, ...]] | None = None

    def __reduce__(self) -> tuple[type[Company], tuple[()]]:
        # Copies of heads join their copy of this as they are made.
        return Company, ()

    def add(self, head: SizeHead) -> None:
        """Take a head in."""
        self._heads.append(weakref.ref(head))
        head.companions = self

    def forget(self) -> None:
        """The groups of some head are others now."""
        self._padded = self._solved = self._masks = None

    def solve(self, head: SizeHead) -> None:
        """Solve for this head and all that can be watched, if it can."""
        watched = {}
        for reference in self._heads:
            other = reference()
            if other is not None and other.companions is self and other.num_groups:
                seen = other._snapshot()
                if seen is not None and other.device == head.device:
                    watched[other] = seen
        if head not in watched:
            return
        inference = torch.is_inference_mode_enabled()
        # On the CPU native code has no need of a graph.
        learns = torch.is_grad_enabled() and not head.features.is_cpu
        # What is made in inference mode cannot be used in a backward to come.
        with torch.inference_mode(False), torch.no_grad(), _exact(head):
            padded = self._padded_groups(list(watched))
            numbers = torch.stack([other.learns().detach() for other in watched])
            with torch.set_grad_enabled(learns):
                scores = head.scores(padded, numbers.requires_grad_(learns))
            shift, levels = head._solve(scores.detach(), padded)
            whole = Solution(shift, levels, head._sizes_at(levels))
            of_each = shift.unbind(), padded.apart(levels), padded.apart(whole.sizes)
            parts = list(map(Solution, *of_each))
            for (other, seen), part in zip(watched.items(), parts, strict=True):
                other.__dict__["_kept"] = seen, inference, part
        references = [weakref.ref(other) for other in watched]
        places = {id(part): place for place, part in enumerate(parts)}
        of = _alone(head), padded, numbers, scores, whole
        self._solved = _Solved(references, *of, parts, places)
        self._masks = None

    def _padded_groups(self, heads: list[SizeHead]) -> Padded:
        """Groups of these heads, padded anew where heads are others than before."""
        temperature = torch.stack([head.temperature for head in heads])
        if self._padded is not None:
            before, padded = self._padded
            if [reference() for reference in before] == heads:
                return replace(padded, temperature=temperature)
        most = max(head.num_groups for head in heads)
        thresholds, steps = heads[0].steps_of(heads)
        room = torch.tensor([head.room() for head in heads], dtype=torch.float64)
        padded = Padded(
            torch.stack([_stretched(head.features, most) for head in heads]),
            torch.stack([_stretched(head.gate, most) for head in heads]),
            torch.stack([_stretched(head.rows, most, 0.0) for head in heads]),
            torch.stack([_stretched(getattr(head, "start", head.gate), most) for head in heads]),
            temperature,
            thresholds,
            steps,
            room.to(temperature.device),
            [head.num_groups for head in heads],
        )
        self._padded = [weakref.ref(head) for head in heads], padded
        return padded

    def mask(self, head: SizeHead, solution: Solution) -> Tensor | None:
        """The soft mask of a solution that was found here, [G, D]: zeros with its gradient."""
        solved = self._solved
        place = None if solved is None else solved.places.get(id(solution))
        if solved is None or place is None:
            return None
        learns = head.learns().requires_grad
        if self._masks is None or self._masks[0][place] != learns:
            heads = [reference() for reference in solved.heads]
            parameters = [other.learns() for other in heads if other is not None]
            if len(parameters) < len(heads):
                return None
            masks = _Masks.apply(solved, *parameters)
            self._masks = [p.requires_grad for p in parameters], masks
        mask = self._masks[1][place]
        return mask if learns else mask.detach()

    def draw(self, solution: Solution) -> None:
        """Add noisy sizes to all solutions that were found with this one."""
        solved = self._solved
        if solved is None or id(solution) not in solved.places:
            return
        with torch.inference_mode(False), torch.no_grad():
            real = solved.head._real_sizes(solved.scores.detach(), solved.whole)
            noisy = solved.head._noisy_dims(real, solved.whole.sizes)
            for part, drawn in zip(solved.parts, solved.padded.apart(noisy), strict=True):
                part.noisy = drawn


class _Masks(torch.autograd.Function):
    """Soft masks of solved heads: zeros, for nobody looks at their values, and their gradients.

    It keeps what it needs beside the graph, which a backward would free: heads whose parameters
    have not changed are looked up again by the same node.
    """

    @staticmethod
    def forward(ctx: Any, solved: _Solved, *parameters: Tensor) -> tuple[Tensor, ...]:
        """See the class.

        Args:
            ctx: of the backward.
            solved: the heads.
            *parameters: theirs.
        """
        ctx.solved = solved
        ctx.set_materialize_grads(False)
        gate = solved.padded.gate
        zeros = gate.new_zeros(()).expand(*gate.shape, solved.head.grid.dim)
        return tuple(solved.padded.apart(zeros))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters whose masks have one."""
        solved: _Solved = ctx.solved
        # Processes that train together wait for the gradient of every parameter of the graph.
        several = are_several()
        found = solved.gradient(gradients)
        rows = zip(found, gradients, ctx.needs_input_grad[1:], strict=True)
        return None, *(
            row if needs and (several or g is not None) else None for row, g, needs in rows
        )


def _stacked(parts: Sequence[Tensor | None], zeros: Tensor) -> Tensor:
    """What there is for each head, [L, G, ...], filled up by zeros of the shape [G, ...]."""
    found = [zeros if part is None else part for part in parts]
    most = zeros.shape[0]
    if any(part.shape[0] < most for part in found):
        # One that is whole at the end, so that it is filled up to that.
        return pad_sequence([*found, zeros], True)[:-1]
    return found[0][None] if len(found) == 1 else torch.stack(found)


def _stretched(values: Tensor, length: int, filling: float | None = None) -> Tensor:
    """Values [G, ...] as [length, ...], filled up by the first one, or a number."""
    if len(values) == length:
        return values
    more = values[:1].expand(length - len(values), *values.shape[1:])
    return torch.cat([values, more if filling is None else torch.full_like(more, filling)])


def _alone(head: SizeHead) -> SizeHead:
    """A head of the same tensors, in no company."""
    alone = type(head).__new__(type(head))
    alone.__dict__.update(head.__dict__, companions=None, _kept=None)
    return alone


def _exact(head: SizeHead) -> torch.autocast:
    """Without rounding to 16 bits, whatever the model around it does."""
    return torch.autocast(head.features.device.type, enabled=False)
