"""Lookups of a table in either phase: rows, and bags of rows."""

from __future__ import annotations

import ctypes
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import amtl_kernels
from amtl.errors import together
from amtl.layer.replicas import are_several
from amtl.layer.rounding import Rounding, trains
from amtl.layer.shown import ShownRows
from amtl.layer.size_head import being_traced
from amtl.layer.table_rows import PATIENCE, TableRows
from amtl.layer.tiers import Weakly, optimizers_of
from amtl_kernels import TieredTable
from amtl_kernels._arguments import Tables
from amtl_kernels._checks import BOUNDS, INDEX_TYPES, padding_of, pooled
from amtl_kernels._planned import Plan, unobserved


class TableLookups(TableRows):
    """The lookups of `AMTLTable`."""

    _kept: _Kept | _Sized | None = None
    _left: Callable[[], Tensor | None] | None = None
    """The weight before freezing, if it lives, where no optimizer of PyTorch's was found for it."""
    _former: Callable[[], nn.Module | None] = Weakly()
    """What it took the place of, if that lives."""
    _still: _Still | None = None
    """The tiers since gradients were first found in them, while nothing changes them."""
    _moved = False
    """Whether something changed them; or it was looked into why not, once."""
    passes = 0
    """Training passes of the search so far, where sizes learn from one of several."""
    _passed: tuple[int, int] | None = None
    """Version of the weight at the last of them, and the backward that had updated it."""
    _unfollowed: Iterator[int]
    """Counts lookups in masters that step sizes did not follow."""
    _cuts = False
    """Whether it was said that these are cut off."""

    def __getstate__(self) -> dict[str, Any]:
        own = ("_kept", "_left", "_still", "_moved", "_unfollowed", "_cuts")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def _embed(self, input: Tensor) -> Tensor:
        """The rows at indices of any shape: `input.shape + [D]`."""
        if self._unchanged(input):
            assert self._kept is not None
            out = self._planned_rows(self._kept.plan, input, self._buffers["row_order"])
            if out is not None:
                return self._shown(out)
        if type(input) is not Tensor and getattr(input, "layout", None) == torch.jagged:
            return self._embed_jagged(cast(Any, input))
        self._check_caller()
        bounds = self._operator_bounds()
        if self.tier_ends is not None:
            table, rows = self._frozen(input)
            return self._shown(self._call(table.embedding, rows, **self._frozen_options()))
        # nn.Module takes a microsecond to find either.
        weight, row_group = self.weight, self.row_group
        assert weight is not None and row_group is not None
        rows, dims, mask, seed = self._searched(input)
        plan = self._sized_plan(dims)
        planned = None if plan is None else self._planned_rows(plan, rows)
        if planned is not None:
            return self._shown(planned)
        out = self._call(
            amtl_kernels.adaptive_embedding,
            weight,
            rows,
            row_group,
            dims,
            mask,
            seed=seed,
            padding_idx=self.padding_idx,
            bounds_check=bounds,
        )
        return self._shown(out)

    def _embed_jagged(self, input: Any) -> Tensor:
        """The rows at indices in a nested tensor, as one with the same lengths."""
        rows = self._embed(input.values())
        given = {"lengths": input.lengths(), "jagged_dim": input._ragged_idx}
        return torch.nested.nested_tensor_from_jagged(rows, input.offsets(), **given)

    def _shown_rows(self) -> Any:
        """What `weight` is once frozen."""
        if self.max_norm is not None:
            # To look rows up would scale them in the table.
            self._refuse_weight()
        if being_traced():
            return self._all_rows()
        shape = self.num_embeddings, self.embedding_dim
        like = self._tiers()[0] if self.steps is None else self.steps
        fused = self.fused_optimizer is not None
        learns = fused or any(block.requires_grad for block in self._tiers())
        return ShownRows.of(shape, like, self._all_rows, self._refuse_weight, learns)

    def _all_rows(self, rows: Tensor | range | None = None) -> Tensor:
        """These rows, or all of them."""
        if isinstance(rows, Tensor) and self.options.bounds_check == "raise":
            return self._embed(rows)
        every = rows if isinstance(rows, range) else range(self.num_embeddings)
        shown = self._embed(torch.arange(every.start, every.stop, device=self.device))
        return nn.functional.embedding(rows, shown) if isinstance(rows, Tensor) else shown

    def _pool(
        self,
        input: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        mode: str,
        include_last_offset: bool,
    ) -> Tensor:
        """The rows at indices, pooled by bag: [B, D]."""
        self._check_caller()
        bounds = self._operator_bounds()
        if self.tier_ends is not None:
            if self.steps is not None and per_sample_weights is not None:
                per_sample_weights = per_sample_weights.to(torch.float32)
            kept = self._kept
            if self._unchanged(input) and isinstance(kept, _Kept):
                table, rows = kept.table, self._frozen_rows(input)
            else:
                table, rows = self._frozen(input)
            out = self._call(
                table.embedding_bag,
                rows,
                offsets,
                mode=mode,
                per_sample_weights=per_sample_weights,
                include_last_offset=include_last_offset,
                **self._frozen_options(),
            )
            return self._shown(out)
        assert self.weight is not None and self.row_group is not None
        rows, dims, mask, seed = self._searched(input)
        plan = self._sized_plan(dims)
        if plan is not None:
            padding = [padding_of(self.padding_idx, self.num_embeddings)]
            given = (per_sample_weights, padding, include_last_offset)
            bags = pooled(self.weight, rows, offsets, mode, *given)
            planned = plan.bags(bags, BOUNDS[self.options.bounds_check])
            if planned is not None:
                return self._shown(planned)
        out = self._call(
            amtl_kernels.adaptive_embedding_bag,
            self.weight,
            rows,
            offsets,
            self.row_group,
            dims,
            mask,
            mode=mode,
            per_sample_weights=per_sample_weights,
            padding_idx=self.padding_idx,
            include_last_offset=include_last_offset,
            seed=seed,
            bounds_check=bounds,
        )
        return self._shown(out)

    def _searched(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Rows to look up in the search phase, sizes and soft mask of the groups, and the seed."""
        noisy = self._noisy()
        dims, mask, sizes = self._head()(noisy, self._learns())
        self._notice_learning(sizes)
        rows = self._renormed(self._searched_rows(input, sizes))
        return rows, dims, mask, self._seed(noisy)

    def _learns(self) -> bool:
        """Whether it is the turn of this pass to let sizes learn."""
        every = self.options.learns_every
        if every == 1 or not self.training or being_traced():
            return True
        weight = self.weight
        assert weight is not None
        # An optimizer that is fused leaves the version as it is.
        now = weight._version, self._updated.backward
        if now != self._passed:
            # nn.Module takes four microseconds to set an attribute.
            self.__dict__.update(passes=self.passes + 1, _passed=now)
        if (self.passes - 1) % every == 0:
            return True
        # Processes that train together wait for the gradient of every parameter of the graph, and
        # a CUDA graph does at each replay what it did when it was captured.
        return are_several() or self._head()._capturing()

    def _sized_plan(self, sizes: Tensor) -> Plan | None:
        """What native code knows of the weight at these sizes of the groups, when evaluating."""
        if self.training or not unobserved():
            return None
        weight, groups = self.weight, self.row_group
        assert weight is not None and groups is not None
        kept = self._kept
        if isinstance(kept, _Sized) and kept.shows(weight, groups, sizes):
            return kept.plan
        if not weight.is_cpu or not weight.is_contiguous():
            return None
        tables = Tables([weight], [1], [self.embedding_dim], [sizes], [groups])
        plan = Plan(tables, None, weight)
        self.__dict__["_kept"] = _Sized(plan, weight, groups, sizes)
        return plan

    def _planned_rows(self, plan: Plan, rows: Tensor, order: Tensor | None = None) -> Tensor | None:
        """Rows by a plan, those in an order if given; None if the operator has something to say."""
        if not rows.is_cpu or rows.dtype not in INDEX_TYPES:
            return None
        return plan.rows(rows.contiguous(), BOUNDS[self.options.bounds_check], order)

    def _renormed(self, rows: Tensor) -> Tensor:
        """These rows, scaled in the table if it has a `max_norm`."""
        if self.max_norm is not None:
            self._renorm(rows)
        return rows

    def _unchanged(self, input: Tensor) -> bool:
        """Whether all is as it was found by the lookup before, evaluating.

        Many small lookups take most of their time looking at the layer.
        """
        kept = self._kept
        if kept is None or self.training or type(input) is not Tensor or not unobserved():
            return False
        if self.max_norm is not None or self._before_use is not None:
            return False
        if isinstance(kept, _Sized):
            if self._buffers["shared_rows"] is not None:
                return False
            now = self._parameters.get("weight"), self._buffers["row_group"]
            return kept.shows(*now, self._head().present_sizes())
        if self.tier_ends is None:
            return False
        tiers, of = self._tiers(), self._steps_from()
        if not kept.shows(tiers, of, None if of is None else _state(of, tiers[0].dtype)):
            return False
        if self._buffers["row_order"] is None and kept.table.rows != self.num_embeddings:
            return False
        if kept.unfollowed is not None:
            self._notice_cut(input, next(kept.unfollowed))
        return True

    def _keep_up(self, rows: Tensor, few: dict[str, Any]) -> None:
        """Let the step sizes of codes that train follow what is looked up."""
        assert self.rounding is not None and self.steps is not None and self.tier_ends is not None
        if torch.is_grad_enabled() and self.fused_optimizer is None:
            raise RuntimeError(
                f"table {self.name!r} has no masters, and codes have no gradient: "
                "layer.fuse(functools.partial(amtl_kernels.optim.RowwiseAdagrad, lr=...)) trains "
                "them (of a model: amtl.fuse), eval() or torch.no_grad() does without"
            )
        tiers = self._tiers()
        if self.rounding.follow(tiers, self.tier_ends, rows, self.embedding_dim, **few):
            # In place: lookups whose backward is to come find codes and step sizes that fit.
            self.rounding.recode(tiers, self.steps)

    def _frozen(self, input: Tensor) -> tuple[TieredTable, Tensor]:
        """The tiers, rounded or decoded where the table has few bits, and places to look up."""
        assert self.tier_ends is not None
        if self._left is not None and self.training and not being_traced():
            self._notice_left()
        rows = self._renormed(self._frozen_rows(input))
        # Past nn.Module, which takes half a microsecond to find what is no plain attribute.
        steps, rounding = self._buffers["steps"], cast(Rounding | None, self._modules["rounding"])
        if self.training and not self._moved and not being_traced():
            if steps is None:
                self._notice_still(rows)
            elif rounding is None:
                self._notice_codes()
        tiers = self._tiers()
        traced, unfollowed = being_traced(), None
        if rounding is not None and steps is None and not traced:
            unfollowed = self.__dict__.setdefault("_unfollowed", itertools.count(1))
        follows = steps is not None or tiers[0].requires_grad
        if rounding is not None and follows and self.training and trains():
            if steps is not None:
                self._keep_up(rows, {"steps": steps.to(torch.float32), "bits": self.options.bits})
            else:
                # Before the lookup, so that one that checkpointing repeats shows the same.
                fused = self.fused_optimizer is not None
                step = None if fused or traced else tiers[0]._version
                rounding.follow(tiers, self.tier_ends, rows, self.embedding_dim, step)
        elif unfollowed is not None:
            self._notice_cut(input, next(unfollowed))
        of = self._steps_from()
        seen = None if of is None or traced else _state(of, tiers[0].dtype)
        kept = self._kept
        if not traced and isinstance(kept, _Kept) and kept.shows(tiers, of, seen):
            return kept.table, rows
        few: dict[str, Any] = {}
        if steps is not None:
            few = {"steps": steps.to(torch.float32), "bits": self.options.bits}
        elif rounding is not None:
            few = rounding.arguments(self.dtype)
        table = TieredTable.of(tiers, self.tier_ends, self.embedding_dim, **few)
        if not traced:
            self.__dict__["_kept"] = _Kept(table, tiers, of, seen, unfollowed)
        return table, rows

    def _steps_from(self) -> Tensor | None:
        """What step sizes are, or follow from, in a table of few bits."""
        steps, rounding = self._buffers["steps"], self._modules["rounding"]
        return steps if steps is not None or rounding is None else rounding._buffers["mean_square"]

    def _notice_left(self) -> None:
        """Warn if the weight from before freezing lives on: whatever trains it does so in vain."""
        left, self._left = self._left, None
        if left is None or left() is None:
            return
        gc.collect()
        # The graph of a loss that is kept holds it, too, unseen by Python, and trains nothing.
        former = self._former()
        mine = None if former is None else former._parameters
        if left() is not None and any(held is not mine for held in gc.get_referrers(left())):
            warnings.warn(
                f"table {self.name!r}: something still holds the weight from before freeze(), a "
                "list of parameters or an optimizer that is not PyTorch's. Training it changes "
                "nothing: ask the model for its parameters again",
                stacklevel=6,
            )

    def _notice_cut(self, input: Tensor, count: int) -> None:
        """Warn, once, if most of what is looked up is beyond the step sizes, which did not follow.

        Looked into at the first such lookup, the second, the fourth and so on.
        """
        if count & (count - 1) or self._cuts or type(input) is not Tensor or not input.numel():
            return
        if input.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        rounding, ends = cast(Rounding, self._modules["rounding"]), self.tier_ends
        assert ends is not None
        if 0 < rounding.turn < _YOUNG:
            # Step sizes follow, and have had no time to.
            return
        if rounding.cut_off(self._tiers(), ends, self._frozen_rows(input)) > _MOST_CUT:
            self._cuts = True
            warnings.warn(
                f"table {self.name!r}: most of the numbers looked up are beyond what its "
                f"{rounding.bits} bits reach and are cut off. Step sizes are buffers that follow "
                "lookups in training (layer.train(), gradients on): an average or a target that "
                "copies parameters has to copy buffers(), too, and a model that is trained in "
                "eval() leaves them as they were",
                stacklevel=7,
            )

    def _notice_still(self, rows: Tensor) -> None:
        """Warn, once, if gradients gather in tiers that nothing changes and no optimizer holds."""
        tiers = self._tiers()
        if self.fused_optimizer is not None or not torch.is_grad_enabled():
            return
        if not all(type(block) is nn.Parameter for block in tiers):
            return
        if all(block.grad is None for block in tiers):
            return
        if tiers[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return
        before, versions = self._still, [block._version for block in tiers]
        if before is None:
            places = rows.detach().flatten()[:_SAMPLE].clone()
            self._still = _Still(0, versions, places, self._numbers(places))
            return
        if versions == before.versions and before.passes + 1 < PATIENCE:
            self._still = before._replace(passes=before.passes + 1)
            return
        self._still, self._moved = None, True
        # Who writes to `parameter.data` leaves its version as it is.
        still = versions == before.versions
        still = still and torch.equal(self._numbers(before.places), before.numbers)
        if still and not optimizers_of(tiers):
            warnings.warn(
                f"table {self.name!r} gets gradients and is in no optimizer, so it stays as it is. "
                f"Frozen, its parameters are called {self.name or 'layer'}.blocks.0 and on: "
                'optimizer.add_param_group({"params": layer.table_parameters()}) (of a model: '
                "amtl.table_parameters), or requires_grad_(False) on these if it is to stay",
                stacklevel=7,
            )

    def _notice_codes(self) -> None:
        """Warn, once, if a table of codes, as a file has it, is looked up in to train.

        That it is to train shows in an optimizer's step: whoever only looks up may leave the mode
        as it is.
        """
        if not torch.is_grad_enabled():
            return
        self._moved = True
        _looked_up_to_train.add(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_tell_of_codes))

    def _numbers(self, places: Tensor) -> Tensor:
        """What trains at some places of the tiers, in order of the tiers."""
        assert self.tier_ends is not None
        found = []
        for block, first, end in zip(
            self._tiers(), (0, *self.tier_ends), self.tier_ends, strict=False
        ):
            here = places[(places >= first) & (places < end)] - first
            found.append(block.detach()[here].flatten())
        return torch.cat(found)

    def _frozen_options(self) -> dict[str, Any]:
        return {"padding_idx": self._frozen_padding(), "bounds_check": self._operator_bounds()}

    def _shown(self, out: Tensor) -> Tensor:
        """What a lookup of stored numbers gives, in the type of the layer and out of its basis."""
        steps = self._buffers["steps"]
        return self._out_of_basis(out if steps is None else out.to(steps.dtype))


_looked_up_to_train: weakref.WeakSet[TableLookups] = weakref.WeakSet()
"""Tables of codes, as files have them, since the last step of any optimizer."""
_hooks: list[Any] = []
"""That of all optimizers, once there was such a table."""


def _tell_of_codes(*_: object) -> None:
    found: dict[int | None, list[str]] = {}
    for table in list(_looked_up_to_train):
        if table.training and table.steps is not None and table.rounding is None:
            found.setdefault(table.options.bits, []).append(table.name)
    _looked_up_to_train.clear()
    for bits, names in found.items():
        warnings.warn(
            f"{together(sorted(names))}: codes of {bits} bits, as in a file, which do not train, "
            "whatever else of the model does: layer.thaw(counts=...) and layer.freeze() make "
            "numbers of them that train; layer.eval() says that they are to stay",
            stacklevel=3,
        )


_SAMPLE = 64
"""Rows by which it is seen whether tiers change."""
_MOST_CUT = 0.5
"""Share of the numbers that may be beyond all codes: of a normal distribution .05 at 2 bits."""
_YOUNG = 64
"""Training steps in which numbers may grow faster than step sizes, which follow one in eight."""


class _Still(NamedTuple):
    """Tiers as they were when gradients were first found in them, and how many passes ago."""

    passes: int
    versions: list[int]
    places: Tensor
    numbers: Tensor


class _Sized(NamedTuple):
    """The weight, groups of its rows and their sizes, as they were looked at."""

    plan: Plan
    weight: Tensor
    groups: Tensor
    sizes: Tensor

    def shows(self, *now: Tensor | None) -> bool:
        """Whether the very same tensors are there."""
        return all(map(is_, self[1:], now))


_State = tuple[torch.dtype, bool, bytes]


class _Kept(NamedTuple):
    """Tiers as they were looked at, whose step sizes are those of a tensor in one of its states.

    What counts lookups in masters that step sizes did not follow comes along.
    """

    table: TieredTable
    tiers: list[nn.Parameter]
    of: Tensor | None
    seen: _State | None
    unfollowed: Iterator[int] | None

    @property
    def plan(self) -> Plan:
        """What native code knows of the table."""
        return self.table.plan

    def shows(self, tiers: list[nn.Parameter], of: Tensor | None, seen: _State | None) -> bool:
        """Whether the very same tensors are unchanged where it matters."""
        same = self.of is of and self.seen == seen and (of is None or seen is not None)
        return same and len(tiers) == len(self.tiers) and all(map(is_, tiers, self.tiers))


def _state(tensor: Tensor, dtype: torch.dtype) -> _State | None:
    """What changes with a tensor; None where it may change unseen, as by replays of CUDA graphs.

    Its very values: writes into `.data`, or by another process, leave its version as it was.
    """
    if not tensor.is_cpu or tensor.is_inference() or not tensor.is_contiguous():
        return None
    values = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
    # What is made in inference mode cannot be saved for a backward.
    return dtype, torch.is_inference_mode_enabled(), values
