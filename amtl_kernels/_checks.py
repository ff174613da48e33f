"""What the public lookups look at before they call an operator, and how they say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from amtl_kernels._arguments import CLAMP, MEAN, OFF, RAISE, SUM, Bags, FewBits, are_codes
from amtl_kernels._calls import kind
from amtl_kernels.rounding import BITS

BoundsCheck = Literal["raise", "clamp", "off"]
Mode = Literal["sum", "mean"]

BOUNDS = {"off": OFF, "raise": RAISE, "clamp": CLAMP}
_MODES = {"sum": SUM, "mean": MEAN}
INDEX_TYPES = (torch.int32, torch.int64)
_SIZE_TYPES = (torch.uint8, torch.int32)
_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(message: str) -> None:
    raise ValueError(message)


def check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(value)}: torch.as_tensor makes one")


def check_whole(value: object, name: str) -> None:
    # Dynamo asks no number that it keeps open for its attributes.
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {kind(value)}")


def check_list(values: object, name: str, items: str) -> None:
    if isinstance(values, (str, Tensor)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be a list of {items}, got {kind(values)}")


def check_table(weight: Tensor, name: str = "weight", codes: bool = False) -> None:
    check_tensor(weight, name)
    if weight.dim() != 2:
        fail(f"{name} must be [N, D], got shape {tuple(weight.shape)}")
    if codes:
        if weight.dtype != torch.uint8:
            fail(f"{name} must be uint8, the type of codes, got {weight.dtype}")
    elif weight.dtype not in _WEIGHT_TYPES:
        fail(f"{name} must be float32, float16 or bfloat16, got {weight.dtype}")
    if not weight.is_contiguous():
        fail(f"{name} must be contiguous: a copy of a table is not made silently")


def check_indices(indices: Tensor, device: torch.device) -> Tensor:
    check_tensor(indices, "indices")
    if indices.dtype not in INDEX_TYPES:
        fail(f"indices must be int32 or int64, got {indices.dtype}")
    if indices.device != device:
        fail(f"indices are on {indices.device}, the table is on {device}")
    return indices.contiguous()


def check_sizes(
    sizes: Tensor, name: str, leading: int | torch.SymInt, device: torch.device, dims: int
) -> Tensor:
    check_tensor(sizes, name)
    if sizes.dtype not in _SIZE_TYPES:
        fail(f"{name} must be uint8 or int32, got {sizes.dtype}")
    if not 1 <= sizes.dim() <= dims or sizes.shape[0] != leading:
        wanted = f"[{leading}]" if dims == 1 else f"[{leading}] or [{leading}, Q]"
        fail(f"{name} must be {wanted}, got shape {tuple(sizes.shape)}")
    if sizes.device != device:
        fail(f"{name} is on {sizes.device}, the table is on {device}")
    return sizes.contiguous()


def check_groups(
    weight: Tensor, row_group: Tensor, group_dims: Tensor, group_mask: Tensor
) -> tuple[Tensor, Tensor]:
    check_tensor(row_group, "row_group")
    check_tensor(group_mask, "group_mask")
    if row_group.dtype != torch.int32:
        fail(f"row_group must be int32, got {row_group.dtype}")
    if row_group.dim() != 1 or row_group.shape[0] != weight.shape[0]:
        fail(f"row_group must be [{weight.shape[0]}], got shape {tuple(row_group.shape)}")
    if group_mask.dim() != 2 or group_mask.shape[1] != weight.shape[1]:
        fail(f"group_mask must be [G, {weight.shape[1]}], got shape {tuple(group_mask.shape)}")
    if not group_mask.is_floating_point():
        fail(f"group_mask must be floating-point, got {group_mask.dtype}")
    if row_group.device != weight.device or group_mask.device != weight.device:
        fail(
            f"row_group is on {row_group.device} and group_mask on {group_mask.device}, the "
            f"table is on {weight.device}"
        )
    dims = check_sizes(group_dims, "group_dims", group_mask.shape[0], weight.device, 2)
    return row_group.contiguous(), dims


def _widest(blocks: Sequence[Tensor], tier_ends: Sequence[int], codes: bool) -> int | None:
    """Most columns of a block; None unless it is plain that blocks and ends are as they should be.

    In the fewest calls a block: there are a dozen, and a lookup in listed tiers looks at them all.
    """
    first = blocks[0]
    if not isinstance(first, Tensor):
        return None
    dtype, device, start, widest = first.dtype, first.device, 0, 0
    if not codes and dtype not in _WEIGHT_TYPES:
        return None
    for block, end in zip(blocks, tier_ends, strict=True):
        if type(end) is not int or not isinstance(block, Tensor) or block.dtype is not dtype:
            return None
        shape = block.shape
        if len(shape) != 2 or shape[0] != end - start:
            return None
        if block.device != device or not block.is_contiguous():
            return None
        start, widest = end, max(widest, shape[1])
    return widest


def _find_fault(blocks: Sequence[Tensor], tier_ends: Sequence[int], codes: bool) -> None:
    """Raises what is wrong with blocks and their ends, if anything is."""
    start = 0
    for c, (block, end) in enumerate(zip(blocks, tier_ends, strict=True)):
        check_table(block, f"blocks[{c}]", codes)
        check_whole(end, f"tier_ends[{c}]")
        if block.shape[0] != end - start:
            fail(f"blocks[{c}] has {block.shape[0]} rows, tier_ends say {end - start}")
        if block.dtype != blocks[0].dtype or block.device != blocks[0].device:
            fail(f"blocks[{c}] differs from blocks[0] in dtype or device")
        start = end


def check_tiers(
    blocks: Sequence[Tensor],
    tier_ends: Sequence[int],
    embedding_dim: int | None,
    bits: int | None = None,
) -> int:
    check_list(blocks, "blocks", "tensors")
    check_list(tier_ends, "tier_ends", "whole numbers")
    if not blocks or len(blocks) != len(tier_ends):
        fail(f"{len(blocks)} blocks and {len(tier_ends)} tier_ends: one end per block is needed")
    codes = bits is not None and isinstance(blocks[0], Tensor) and are_codes(blocks)
    widest = _widest(blocks, tier_ends, codes)
    if widest is None:
        _find_fault(blocks, tier_ends, codes)
        widest = max(block.shape[1] for block in blocks)
    if codes:
        widest = widest * 8 // (bits or 8)
    dim = widest if embedding_dim is None else embedding_dim
    check_whole(dim, "embedding_dim")
    if dim < widest:
        fail(f"embedding_dim is {dim}, but the widest tier has {widest} columns")
    if dim < 1:
        fail("embedding_dim must be given, and at least 1, where no tier has any columns")
    return dim


def few_bits(
    blocks: Sequence[Tensor],
    steps: Tensor | None,
    bits: int | None,
    step_ends: Sequence[int] | None,
) -> FewBits | None:
    if steps is None and bits is None:
        if step_ends is not None:
            fail("step_ends need steps and bits")
        return None
    if steps is None or bits is None:
        raise ValueError("steps and bits go together: a table has both or neither")
    check_whole(bits, "bits")
    if bits not in BITS:
        fail(f"bits must be 2, 4, 8 or 16, got {bits}")
    check_tensor(steps, "steps")
    check_list(blocks, "blocks", "tensors")
    if step_ends is not None:
        check_list(step_ends, "step_ends", "whole numbers")
    parts = len(blocks if step_ends is None else step_ends)
    if steps.dtype != torch.float32 or steps.shape != (parts,):
        fail(f"steps must be float32 [{parts}], got {steps.dtype} {tuple(steps.shape)}")
    if blocks and isinstance(blocks[0], Tensor) and steps.device != blocks[0].device:
        fail(f"steps are on {steps.device}, the table is on {blocks[0].device}")
    ends = None if step_ends is None else list(step_ends)
    return FewBits([steps.detach().contiguous()], [int(bits)], ends)


def padding_of(padding_idx: int | None, rows: int) -> int:
    if padding_idx is None:
        return -1
    check_whole(padding_idx, "padding_idx")
    if not -rows <= padding_idx < rows:
        fail(f"padding_idx {padding_idx} is outside a table of {rows} rows")
    return padding_idx + rows if padding_idx < 0 else padding_idx


def bounds_of(bounds_check: str) -> int:
    if not isinstance(bounds_check, str) or bounds_check not in BOUNDS:
        fail(f"bounds_check must be 'raise', 'clamp' or 'off', got {bounds_check!r}")
    return BOUNDS[bounds_check]


def pooled(
    table: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    padding_idx: list[int],
    include_last_offset: bool,
) -> Bags:
    """Pooled lookups, checked, of flat indices."""
    if not isinstance(mode, str) or mode not in _MODES:
        fail(f"mode must be 'sum' or 'mean', got {mode!r}")
    indices = check_indices(indices, table.device)
    if per_sample_weights is not None:
        check_tensor(per_sample_weights, "per_sample_weights")
        if mode != "sum":
            fail("per_sample_weights go with mode='sum' only, as in embedding_bag")
        if per_sample_weights.shape != indices.shape:
            fail(
                f"per_sample_weights have shape {tuple(per_sample_weights.shape)}, indices "
                f"{tuple(indices.shape)}"
            )
        if per_sample_weights.dtype != table.dtype or per_sample_weights.device != table.device:
            fail(
                f"per_sample_weights are {per_sample_weights.dtype} on "
                f"{per_sample_weights.device}, the table is {table.dtype} on {table.device}"
            )
        per_sample_weights = per_sample_weights.reshape(-1).contiguous()
    if indices.dim() == 2:
        if offsets is not None:
            fail("2-D indices are bags of equal length: offsets must be None")
        # int64 whatever the indices are: there may be more of them than int32 can count.
        bags, length = indices.shape
        offsets = torch.arange(0, bags + 1, device=indices.device).mul_(length)
        indices = indices.reshape(-1)
        return Bags(indices, offsets, per_sample_weights, _MODES[mode], padding_idx, True)
    if indices.dim() != 1:
        fail(f"indices must be 1-D with offsets, or 2-D, got shape {tuple(indices.shape)}")
    if offsets is None:
        raise ValueError("1-D indices need offsets")
    check_tensor(offsets, "offsets")
    if offsets.dim() != 1 or offsets.dtype not in INDEX_TYPES:
        fail(
            f"offsets must be 1-D int32 or int64, got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)}"
        )
    if offsets.device != table.device:
        fail(f"offsets are on {offsets.device}, the table is on {table.device}")
    if include_last_offset and offsets.shape[0] == 0:
        fail("include_last_offset needs at least one offset")
    pooling, offsets = _MODES[mode], offsets.contiguous()
    return Bags(indices, offsets, per_sample_weights, pooling, padding_idx, include_last_offset)


def plain(indices: Tensor, padding: int) -> Bags:
    """Lookups without pooling."""
    return Bags(indices, None, None, SUM, [padding], False)
