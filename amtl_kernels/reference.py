"""Every operator in plain PyTorch: the meaning that all backends are tested against.

The functions take the arguments of the operator of the same name (``amtl_kernels._schema``), in
the same order, on any device and for any floating-point type; float64 is computed in float64, the
rest in float32 with one rounding at the end. Written to be read, not to be fast: everything is
gathered per lookup, ``O(L * D)`` memory for ``L`` lookups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from amtl_kernels.rounding import mix, round_stochastically, rounding_bits, row_term

SUM, MEAN = 0, 1
"""Values of ``mode``."""
OFF, RAISE, CLAMP = 0, 1, 2
"""Values of ``bounds_check``."""


def hash_columns(rows: Tensor, seed: int, columns: int) -> Tensor:
    """Which of the ``columns`` size columns each row takes under ``seed``.

    An integer hash (two multiply-xorshift rounds) of row and seed, scaled to ``0..columns-1``. It
    is the same on every backend, and the same in forward and backward, because no floating-point
    number takes part.

    Args:
        rows: Row numbers, any integer type and shape.
        seed: Any 64-bit integer.
        columns: Number of columns ``Q >= 1``.

    Returns:
        int64 tensor of the shape of ``rows``.
    """
    return (mix(row_term(rows, seed)) * columns) >> 32


def warn_clamped(value: int, position: int, rows: int) -> None:
    """Warns once per process about an index that ``bounds_check="clamp"`` moved into range."""
    global _warned_clamped
    if not _warned_clamped:
        _warned_clamped = True
        warnings.warn(
            f"index {value} at position {position} is out of range for a table of {rows} rows and "
            f"was clamped; this is said once",
            RuntimeWarning,
            stacklevel=2,
        )


_warned_clamped = False


def check_indices(indices: Tensor, rows: int, bounds_check: int) -> Tensor:
    """The flat indices as int64, checked against ``rows`` as ``bounds_check`` says."""
    flat = indices.reshape(-1).to(torch.int64)
    if bounds_check == OFF:
        return flat
    bad = ((flat < 0) | (flat >= rows)).nonzero()
    if bad.numel():
        position = int(bad[0])
        value = int(flat[position])
        if bounds_check == RAISE or rows == 0:
            raise IndexError(
                f"index {value} at position {position} is out of range for a table of {rows} rows"
            )
        warn_clamped(value, position, rows)
        flat = flat.clamp(0, rows - 1)
    return flat


def check_offsets(offsets: Tensor, lookups: int) -> None:
    """Raises ValueError unless ``offsets`` start at 0, never decrease and end within the input."""
    if offsets.numel() == 0:
        return
    values = offsets.to(torch.int64)
    if int(values[0]) != 0:
        raise ValueError(f"offsets must start at 0, but offsets[0] is {int(values[0])}")
    falls = (values[1:] < values[:-1]).nonzero()
    if falls.numel():
        i = int(falls[0]) + 1
        raise ValueError(
            f"offsets must not decrease, but offsets[{i}] = {int(values[i])} is smaller than "
            f"offsets[{i - 1}] = {int(values[i - 1])}"
        )
    if int(values[-1]) > lookups:
        raise ValueError(
            f"offsets must end within the {lookups} indices, but offsets[{values.numel() - 1}] is "
            f"{int(values[-1])}"
        )


def _in_bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    """The flat indices up to the last offset: what follows is in no bag and is never looked at."""
    flat = indices.reshape(-1)
    if offsets is None:
        return flat
    check_offsets(offsets, flat.numel())
    return flat[: int(offsets[-1])] if include_last_offset else flat


def _bag_of_lookup(offsets: Tensor, lookups: int, include_last_offset: bool) -> tuple[Tensor, int]:
    """The bag of every position (-1: there are none) and the number of bags."""
    bags = offsets.numel() - int(include_last_offset)
    positions = torch.arange(lookups, device=offsets.device)
    return torch.searchsorted(offsets.to(torch.int64), positions, right=True) - 1, bags


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_sizes(sizes: Tensor, dim: int) -> Tensor:
    bad = ((sizes < 0) | (sizes > dim)).nonzero()
    if bad.numel():
        position = int(bad[0])
        raise ValueError(f"size {int(sizes[position])} at position {position} is outside 0..{dim}")
    return sizes


def _adaptive_sizes(
    rows: Tensor, row_group: Tensor, group_dims: Tensor, seed: int, dim: int
) -> Tensor:
    """Kept sizes of ``rows``: one per group, or one per group and hashed column."""
    group = row_group[rows].to(torch.int64)
    if group_dims.dim() == 1:
        return _check_sizes(group_dims[group].to(torch.int64), dim)
    column = hash_columns(rows, seed, group_dims.shape[1])
    return _check_sizes(group_dims[group, column].to(torch.int64), dim)


def _keep_prefix(values: Tensor, sizes: Tensor) -> Tensor:
    """``values [M, D]`` with everything past ``sizes [M]`` set to zero, NaN and Inf included."""
    columns = torch.arange(values.shape[1], device=values.device)
    return torch.where(columns < sizes[:, None], values, torch.zeros_like(values))


def _mean_scale(bag: Tensor, bags: int, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / number of counted lookups`` of each bag; 1 for an empty one."""
    counts = torch.zeros(bags, dtype=torch.int64, device=bag.device)
    counts.index_add_(0, bag[counted], torch.ones_like(bag[counted]))
    return 1.0 / counts.clamp(min=1).to(dtype)


def _pool(
    values: Tensor,
    flat: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> Tensor:
    """Pools masked rows ``values [L, D]`` into bags ``[B, D]``."""
    compute = _compute_type(values.dtype)
    bag, bags = _bag_of_lookup(offsets, flat.numel(), include_last_offset)
    counted = (bag >= 0) & (flat != padding_idx)
    terms = values.to(compute)
    if per_sample_weights is not None:
        terms = terms * per_sample_weights[: flat.numel()].to(compute)[:, None]
    out = torch.zeros(bags, values.shape[1], dtype=compute, device=values.device)
    out = out.index_add(0, bag[counted], terms[counted])
    if mode == MEAN:
        out = out * _mean_scale(bag, bags, counted, compute)[:, None]
    return out.to(values.dtype)


def masked_embedding(
    weight: Tensor, indices: Tensor, row_dims: Tensor, padding_idx: int, bounds_check: int
) -> Tensor:
    """``out[.., j] = weight[i, j]`` for ``j < row_dims[i]``, else 0."""
    flat = check_indices(indices, weight.shape[0], bounds_check)
    sizes = _check_sizes(row_dims[flat].to(torch.int64), weight.shape[1])
    return _keep_prefix(weight[flat], sizes).reshape(*indices.shape, weight.shape[1])


def masked_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    bounds_check: int,
) -> Tensor:
    """Masked rows pooled by bag."""
    used = _in_bags(indices, offsets, include_last_offset)
    values = masked_embedding(weight, used, row_dims, padding_idx, bounds_check)
    flat = check_indices(used, weight.shape[0], bounds_check)
    return _pool(values, flat, offsets, per_sample_weights, mode, padding_idx, include_last_offset)


def adaptive_embedding(
    weight: Tensor,
    indices: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    seed: int,
    padding_idx: int,
    bounds_check: int,
) -> Tensor:
    """As :func:`masked_embedding`, with sizes read through groups and hashed columns."""
    flat = check_indices(indices, weight.shape[0], bounds_check)
    sizes = _adaptive_sizes(flat, row_group, group_dims, seed, weight.shape[1])
    return _keep_prefix(weight[flat], sizes).reshape(*indices.shape, weight.shape[1])


def adaptive_embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    row_group: Tensor,
    group_dims: Tensor,
    group_mask: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    bounds_check: int,
) -> Tensor:
    """As :func:`masked_embedding_bag`, with sizes read through groups and hashed columns."""
    used = _in_bags(indices, offsets, include_last_offset)
    values = adaptive_embedding(
        weight, used, row_group, group_dims, group_mask, seed, padding_idx, bounds_check
    )
    flat = check_indices(used, weight.shape[0], bounds_check)
    return _pool(values, flat, offsets, per_sample_weights, mode, padding_idx, include_last_offset)


def tiered_embedding(
    blocks: list[Tensor],
    tier_ends: list[int],
    indices: Tensor,
    embedding_dim: int,
    padding_idx: int,
    bounds_check: int,
) -> Tensor:
    """Row ``i`` of tier ``c`` is ``blocks[c][i - tier_ends[c-1]]``, followed by zeros."""
    flat = check_indices(indices, tier_ends[-1] if tier_ends else 0, bounds_check)
    out = blocks[0].new_zeros(flat.numel(), embedding_dim)
    start = 0
    for block, end in zip(blocks, tier_ends, strict=True):
        mine = ((flat >= start) & (flat < end)).nonzero()[:, 0]
        padded = torch.nn.functional.pad(
            block[flat[mine] - start], (0, embedding_dim - block.shape[1])
        )
        out = out.index_copy(0, mine, padded)
        start = end
    return out.reshape(*indices.shape, embedding_dim)


def tiered_embedding_bag(
    blocks: list[Tensor],
    tier_ends: list[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    bounds_check: int,
) -> Tensor:
    """Tier rows pooled by bag."""
    used = _in_bags(indices, offsets, include_last_offset)
    values = tiered_embedding(blocks, tier_ends, used, embedding_dim, padding_idx, bounds_check)
    flat = check_indices(used, tier_ends[-1], bounds_check)
    return _pool(values, flat, offsets, per_sample_weights, mode, padding_idx, include_last_offset)


def _incoming(
    grad: Tensor,
    flat: Tensor,
    offsets: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient ``[L, D]`` that reaches each lookup before its own weight, and which count."""
    compute = _compute_type(grad.dtype)
    counted = flat != padding_idx
    if offsets is None:
        return grad.reshape(flat.numel(), grad.shape[-1]).to(compute), counted
    bag, bags = _bag_of_lookup(offsets, flat.numel(), include_last_offset)
    counted = counted & (bag >= 0)
    if bags == 0:
        return grad.new_zeros(flat.numel(), grad.shape[1], dtype=compute), counted
    delta = grad.to(compute)[bag.clamp(min=0)]
    if mode == MEAN:
        delta = delta * _mean_scale(bag, bags, counted, compute)[bag.clamp(min=0), None]
    return delta, counted


def _scale(delta: Tensor, per_sample_weights: Tensor | None) -> Tensor:
    if per_sample_weights is None:
        return delta
    return delta * per_sample_weights[: delta.shape[0]].to(delta.dtype)[:, None]


def _reduce_rows(delta: Tensor, flat: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows in ascending order and their summed gradients."""
    rows = flat[counted].sort().values.unique_consecutive()
    sums = torch.zeros(rows.numel(), delta.shape[1], dtype=delta.dtype, device=delta.device)
    return rows, sums.index_add(0, torch.searchsorted(rows, flat[counted]), delta[counted])


def _psw_grad(
    delta: Tensor, values: Tensor, sizes: Tensor, counted: Tensor, indices: Tensor
) -> Tensor:
    """``[L]`` products of gradients and kept prefixes, zero for padding and past the last bag."""
    dots = _keep_prefix(delta * values.to(delta.dtype), sizes).sum(1)
    out = values.new_zeros(indices.numel())
    out[: dots.numel()] = torch.where(counted, dots, torch.zeros_like(dots)).to(values.dtype)
    return out


def masked_embedding_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row gradients ``(rows [U], grads [U, D])`` and the gradient of ``per_sample_weights``."""
    used = _in_bags(indices, offsets, include_last_offset)
    flat = check_indices(used, weight.shape[0], RAISE)
    delta, counted = _incoming(grad, flat, offsets, mode, padding_idx, include_last_offset)
    rows, grads, psw = flat.new_empty(0), weight.new_empty(0, weight.shape[1]), weight.new_empty(0)
    if weight_grad:
        rows, sums = _reduce_rows(_scale(delta, per_sample_weights), flat, counted)
        grads = _keep_prefix(sums, row_dims[rows].to(torch.int64)).to(weight.dtype)
    if psw_grad:
        sizes = row_dims[flat].to(torch.int64)
        psw = _psw_grad(delta, weight[flat], sizes, counted, indices)
    return rows, grads, psw


def adaptive_embedding_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor,
    group_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    weight_grad: bool,
    mask_grad: bool,
    psw_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`masked_embedding_backward`, and the gradient of the soft mask.

    ``group_mask_grad[g, j] = sum of delta_j * weight[i, j]`` over the lookups of the rows ``i`` of
    group ``g`` and over all ``j``, masked ones too.
    """
    dim = weight.shape[1]
    used = _in_bags(indices, offsets, include_last_offset)
    flat = check_indices(used, weight.shape[0], RAISE)
    delta, counted = _incoming(grad, flat, offsets, mode, padding_idx, include_last_offset)
    rows, grads, psw = flat.new_empty(0), weight.new_empty(0, dim), weight.new_empty(0)
    mask = torch.empty(0, dim, dtype=delta.dtype, device=weight.device)
    if weight_grad or mask_grad:
        all_rows, sums = _reduce_rows(_scale(delta, per_sample_weights), flat, counted)
        if weight_grad:
            rows = all_rows
            sizes = _adaptive_sizes(rows, row_group, group_dims, seed, dim)
            grads = _keep_prefix(sums, sizes).to(weight.dtype)
        if mask_grad:
            products = sums * weight[all_rows].to(sums.dtype)
            mask = torch.zeros(group_dims.shape[0], dim, dtype=sums.dtype, device=sums.device)
            mask = mask.index_add(0, row_group[all_rows].to(torch.int64), products)
    if psw_grad:
        sizes = _adaptive_sizes(flat, row_group, group_dims, seed, dim)
        psw = _psw_grad(delta, weight[flat], sizes, counted, indices)
    return rows, grads, mask, psw


def tiered_embedding_backward(
    grad: Tensor,
    blocks: list[Tensor],
    tier_ends: list[int],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    weight_grad: bool,
    psw_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Row gradients of every tier, rows counted from the tier's start."""
    used = _in_bags(indices, offsets, include_last_offset)
    flat = check_indices(used, tier_ends[-1], RAISE)
    delta, counted = _incoming(grad, flat, offsets, mode, padding_idx, include_last_offset)
    rows = [flat.new_empty(0) for _ in blocks]
    grads = [block.new_empty(0, block.shape[1]) for block in blocks]
    psw = blocks[0].new_empty(0)
    if weight_grad:
        all_rows, sums = _reduce_rows(_scale(delta, per_sample_weights), flat, counted)
        start = 0
        for c, (block, end) in enumerate(zip(blocks, tier_ends, strict=True)):
            mine = (all_rows >= start) & (all_rows < end)
            rows[c] = all_rows[mine] - start
            grads[c] = sums[mine, : block.shape[1]].to(block.dtype).contiguous()
            start = end
    if psw_grad:
        values = tiered_embedding(blocks, tier_ends, flat, embedding_dim, -1, OFF)
        tier = torch.bucketize(flat, torch.tensor(tier_ends, device=flat.device), right=True)
        widths = torch.tensor([block.shape[1] for block in blocks], device=flat.device)
        psw = _psw_grad(delta, values, widths[tier], counted, indices)
    return rows, grads, psw


def kept_prefix(grads: Tensor) -> Tensor:
    """``[U, D]`` bool: True up to the last non-zero value of each gradient row."""
    if grads.numel() == 0:
        return grads.to(torch.bool)
    return (grads != 0).to(torch.uint8).flip(1).cummax(1).values.flip(1).to(torch.bool)


def _touch(
    weight: Tensor, rows: Tensor, grads: Tensor, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Touched weights, their gradients with weight decay, and the kept prefix.

    Past the prefix the gradient is zero, whatever the weights are there.
    """
    compute = _compute_type(weight.dtype)
    kept = kept_prefix(grads)
    old = weight[rows].to(compute)
    return old, torch.where(kept, grads.to(compute) + weight_decay * old, 0.0), kept


def _write(
    weight: Tensor, rows: Tensor, kept: Tensor, values: Tensor, rounding_seed: int | None
) -> None:
    """Writes the kept prefix of the rows; what lies past it stays, bit for bit."""
    values = torch.where(kept, values, weight[rows].to(values.dtype))
    if rounding_seed is None or weight.element_size() != 2:
        weight[rows] = values.to(weight.dtype)
    else:
        bits = rounding_bits(rows, weight.shape[1], rounding_seed)
        weight[rows] = round_stochastically(values, weight.dtype, bits)


def apply_sgd_(
    weight: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """``w -= lr * (g + weight_decay * w)``."""
    old, g, kept = _touch(weight, rows, grads, weight_decay)
    _write(weight, rows, kept, old - lr * g, rounding_seed)


def apply_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """``s += g^2``, ``w -= lr * g / (sqrt(s) + eps)``, as ``torch.optim.Adagrad``."""
    old, g, kept = _touch(weight, rows, grads, weight_decay)
    state = state_sum[rows].to(g.dtype)
    state = torch.where(kept, state + g * g, state)
    state_sum[rows] = state.to(state_sum.dtype)
    _write(weight, rows, kept, old - lr * g / (state.sqrt() + eps), rounding_seed)


def apply_rowwise_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """``s += mean(g^2)`` over the kept prefix, ``w -= lr * g / (sqrt(s) + eps)``; ``s`` is [N]."""
    old, g, kept = _touch(weight, rows, grads, weight_decay)
    state, size = state_sum[rows].to(g.dtype), kept.sum(1)
    state = torch.where(size > 0, state + (g * g).sum(1) / size, state)
    state_sum[rows] = state.to(state_sum.dtype)
    _write(weight, rows, kept, old - lr * g / (state.sqrt() + eps)[:, None], rounding_seed)


def apply_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grads: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None = None,
) -> None:
    """Lazy Adam: ``torch.optim.Adam`` at step ``step`` on the kept prefix of the touched rows."""
    old, g, kept = _touch(weight, rows, grads, weight_decay)
    m = exp_avg[rows].to(g.dtype)
    v = exp_avg_sq[rows].to(g.dtype)
    m = torch.where(kept, beta1 * m + (1 - beta1) * g, m)
    v = torch.where(kept, beta2 * v + (1 - beta2) * g * g, v)
    exp_avg[rows] = m.to(exp_avg.dtype)
    exp_avg_sq[rows] = v.to(exp_avg_sq.dtype)
    change = lr / (1 - beta1**step) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
    _write(weight, rows, kept, old - change, rounding_seed)


SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM = 0, 1, 2, 3
"""Values of ``optimizer``."""


def split_state(
    tables: int, state: list[Tensor], optimizer: int, hyper: list[float]
) -> tuple[list[list[Tensor]], list[float]]:
    """State table by table, and ``hyper`` with the step of the counter, if there is one."""
    moments = (0, 1, 1, 2)[optimizer]
    if len(state) == tables * moments + 1:
        hyper = [*hyper[:5], float(state[-1]), *hyper[6:]]
    return [state[t * moments : (t + 1) * moments] for t in range(tables)], hyper


def update_rows(
    weight: Tensor,
    state: list[Tensor],
    rows: Tensor,
    grads: Tensor,
    optimizer: int,
    hyper: list[float],
) -> None:
    """Whatever backend is set updates the rows: a fused backward is a backward and an update."""
    lr, eps, weight_decay, beta1, beta2, step, *stochastic = hyper
    seed = int(step) if any(stochastic) else None
    ops = torch.ops.amtl
    if optimizer == SGD:
        ops.apply_sgd_(weight, rows, grads, lr, weight_decay, seed)
    elif optimizer == ADAGRAD:
        ops.apply_adagrad_(weight, *state, rows, grads, lr, eps, weight_decay, seed)
    elif optimizer == ROWWISE_ADAGRAD:
        ops.apply_rowwise_adagrad_(weight, *state, rows, grads, lr, eps, weight_decay, seed)
    else:
        betas = (beta1, beta2)
        ops.apply_adam_(weight, *state, rows, grads, int(step), lr, *betas, eps, weight_decay, seed)


def masked_embedding_update_(
    weight: Tensor,
    state: list[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: list[float],
) -> Tensor:
    """:func:`masked_embedding_backward`, then the optimizer's update."""
    rows, grads, psw = torch.ops.amtl.masked_embedding_backward(
        grad,
        weight,
        indices,
        offsets,
        row_dims,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        True,
        psw_grad,
    )
    (mine,), hyper = split_state(1, state, optimizer, hyper)
    update_rows(weight, mine, rows, grads, optimizer, hyper)
    return psw


def adaptive_embedding_update_(
    weight: Tensor,
    state: list[Tensor],
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    row_group: Tensor,
    group_dims: Tensor,
    per_sample_weights: Tensor | None,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    seed: int,
    mask_grad: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: list[float],
    groups_sorted: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`adaptive_embedding_backward`, then the optimizer's update."""
    rows, grads, mask, psw = torch.ops.amtl.adaptive_embedding_backward(
        grad,
        weight,
        indices,
        offsets,
        row_group,
        group_dims,
        per_sample_weights,
        mode,
        padding_idx,
        include_last_offset,
        seed,
        True,
        mask_grad,
        psw_grad,
    )
    (mine,), hyper = split_state(1, state, optimizer, hyper)
    update_rows(weight, mine, rows, grads, optimizer, hyper)
    return mask, psw


def tiered_embedding_update_(
    blocks: list[Tensor],
    state: list[Tensor],
    grad: Tensor,
    tier_ends: list[int],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    mode: int,
    padding_idx: int,
    include_last_offset: bool,
    psw_grad: bool,
    optimizer: int,
    hyper: list[float],
) -> Tensor:
    """:func:`tiered_embedding_backward`, then the optimizer's update of every block."""
    rows, grads, psw = torch.ops.amtl.tiered_embedding_backward(
        grad,
        blocks,
        tier_ends,
        indices,
        offsets,
        per_sample_weights,
        embedding_dim,
        mode,
        padding_idx,
        include_last_offset,
        True,
        psw_grad,
    )
    states, hyper = split_state(len(blocks), state, optimizer, hyper)
    for c, block in enumerate(blocks):
        update_rows(block, states[c], rows[c], grads[c], optimizer, hyper)
    return psw


IMPLEMENTATIONS: dict[str, Callable[..., object]] = {
    "masked_embedding": masked_embedding,
    "masked_embedding_bag": masked_embedding_bag,
    "adaptive_embedding": adaptive_embedding,
    "adaptive_embedding_bag": adaptive_embedding_bag,
    "tiered_embedding": tiered_embedding,
    "tiered_embedding_bag": tiered_embedding_bag,
    "masked_embedding_backward": masked_embedding_backward,
    "adaptive_embedding_backward": adaptive_embedding_backward,
    "tiered_embedding_backward": tiered_embedding_backward,
    "apply_sgd_": apply_sgd_,
    "apply_adagrad_": apply_adagrad_,
    "apply_rowwise_adagrad_": apply_rowwise_adagrad_,
    "apply_adam_": apply_adam_,
    "masked_embedding_update_": masked_embedding_update_,
    "adaptive_embedding_update_": adaptive_embedding_update_,
    "tiered_embedding_update_": tiered_embedding_update_,
}
"""Operator name to reference."""
