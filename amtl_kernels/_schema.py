"""The operator schemas, defined once for every backend (``torch.ops.amtl``).

Backends only register implementations. The plain-PyTorch reference is the fallback for devices
without one, so that the package works without any compiled module.

Each lookup has a twin with the suffix ``_densegrad``: the same values, and a dense gradient of the
weight instead of a sparse one, for optimizers that refuse sparse gradients.
"""

from __future__ import annotations

import torch

_LOOKUPS: dict[str, str] = {
    "masked_embedding": (
        "(Tensor weight, Tensor indices, Tensor row_dims, int padding_idx, int bounds_check)"
        " -> Tensor"
    ),
    "masked_embedding_bag": (
        "(Tensor weight, Tensor indices, Tensor offsets, Tensor row_dims,"
        " Tensor? per_sample_weights, int mode, int padding_idx, bool include_last_offset,"
        " int bounds_check) -> Tensor"
    ),
    "adaptive_embedding": (
        "(Tensor weight, Tensor indices, Tensor row_group, Tensor group_dims, Tensor group_mask,"
        " SymInt seed, int padding_idx, int bounds_check) -> Tensor"
    ),
    "adaptive_embedding_bag": (
        "(Tensor weight, Tensor indices, Tensor offsets, Tensor row_group, Tensor group_dims,"
        " Tensor group_mask, Tensor? per_sample_weights, int mode, int padding_idx,"
        " bool include_last_offset, SymInt seed, int bounds_check) -> Tensor"
    ),
    "tiered_embedding": (
        "(Tensor[] blocks, int[] tier_ends, Tensor indices, int embedding_dim, int padding_idx,"
        " int bounds_check) -> Tensor"
    ),
    "tiered_embedding_bag": (
        "(Tensor[] blocks, int[] tier_ends, Tensor indices, Tensor offsets,"
        " Tensor? per_sample_weights, int embedding_dim, int mode, int padding_idx,"
        " bool include_last_offset, int bounds_check) -> Tensor"
    ),
}

_BACKWARDS: dict[str, str] = {
    "masked_embedding_backward": (
        "(Tensor grad, Tensor weight, Tensor indices, Tensor? offsets, Tensor row_dims,"
        " Tensor? per_sample_weights, int mode, int padding_idx, bool include_last_offset,"
        " bool weight_grad, bool psw_grad) -> (Tensor rows, Tensor grads, Tensor psw_grad)"
    ),
    "adaptive_embedding_backward": (
        "(Tensor grad, Tensor weight, Tensor indices, Tensor? offsets, Tensor row_group,"
        " Tensor group_dims, Tensor? per_sample_weights, int mode, int padding_idx,"
        " bool include_last_offset, SymInt seed, bool weight_grad, bool mask_grad, bool psw_grad)"
        " -> (Tensor rows, Tensor grads, Tensor group_mask_grad, Tensor psw_grad)"
    ),
    "tiered_embedding_backward": (
        "(Tensor grad, Tensor[] blocks, int[] tier_ends, Tensor indices, Tensor? offsets,"
        " Tensor? per_sample_weights, int embedding_dim, int mode, int padding_idx,"
        " bool include_last_offset, bool weight_grad, bool psw_grad)"
        " -> (Tensor[] rows, Tensor[] grads, Tensor psw_grad)"
    ),
}

# With a `rounding_seed`, 16-bit weights are rounded stochastically, by `rounding.rounding_bits`.
_OPTIMIZERS: dict[str, str] = {
    "apply_sgd_": (
        "(Tensor(a!) weight, Tensor rows, Tensor grads, float lr, float weight_decay,"
        " int? rounding_seed=None) -> ()"
    ),
    "apply_adagrad_": (
        "(Tensor(a!) weight, Tensor(b!) state_sum, Tensor rows, Tensor grads, float lr, float eps,"
        " float weight_decay, int? rounding_seed=None) -> ()"
    ),
    "apply_rowwise_adagrad_": (
        "(Tensor(a!) weight, Tensor(b!) state_sum, Tensor rows, Tensor grads, float lr, float eps,"
        " float weight_decay, int? rounding_seed=None) -> ()"
    ),
    "apply_adam_": (
        "(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows,"
        " Tensor grads, int step, float lr, float beta1, float beta2, float eps,"
        " float weight_decay, int? rounding_seed=None) -> ()"
    ),
}

# A backward that applies the optimizer's update to each row as soon as its gradient is summed:
# `optimizer` is 0 SGD, 1 Adagrad, 2 row-wise Adagrad, 3 Adam; `state` holds its tensors (per block
# one after the other); `hyper` is lr, eps, weight_decay, beta1, beta2, step, and 1 after them if
# 16-bit weights are rounded stochastically, seeded by the step. One int64 tensor more at the end of
# `state` counts the steps in place of `hyper`: a CUDA graph reads it at every replay.
# `groups_sorted` promises that `row_group` never falls, which saves a sort or a wait for the GPU.
_UPDATES: dict[str, str] = {
    "masked_embedding_update_": (
        "(Tensor(a!) weight, Tensor(b!)[] state, Tensor grad, Tensor indices, Tensor? offsets,"
        " Tensor row_dims, Tensor? per_sample_weights, int mode, int padding_idx,"
        " bool include_last_offset, bool psw_grad, int optimizer, float[] hyper)"
        " -> Tensor psw_grad"
    ),
    "adaptive_embedding_update_": (
        "(Tensor(a!) weight, Tensor(b!)[] state, Tensor grad, Tensor indices, Tensor? offsets,"
        " Tensor row_group, Tensor group_dims, Tensor? per_sample_weights, int mode,"
        " int padding_idx, bool include_last_offset, SymInt seed, bool mask_grad, bool psw_grad,"
        " int optimizer, float[] hyper, bool groups_sorted=False)"
        " -> (Tensor group_mask_grad, Tensor psw_grad)"
    ),
    "tiered_embedding_update_": (
        "(Tensor(a!)[] blocks, Tensor(b!)[] state, Tensor grad, int[] tier_ends, Tensor indices,"
        " Tensor? offsets, Tensor? per_sample_weights, int embedding_dim, int mode,"
        " int padding_idx, bool include_last_offset, bool psw_grad, int optimizer,"
        " float[] hyper) -> Tensor psw_grad"
    ),
}

# T tables in one call, in the layout of FBGEMM's table-batched embeddings: indices concatenated by
# table, offsets [T * B + 1], output [B, sum of the widths]. Tiers of all tables are concatenated,
# `tier_counts` says how many each has; `padding_idx` has one row per table, -1 for none. Mask
# gradients are one flat tensor, table after table.
_TABLE_FORMS: dict[str, str] = {
    "masked": "Tensor[] weights, Tensor[] row_dims",
    "adaptive": "Tensor[] weights, Tensor[] row_groups, Tensor[] group_dims",
    "tiered": "Tensor[] blocks, int[] tier_counts, int[] tier_ends, int[] embedding_dims",
}
_TABLE_BAGS = (
    "Tensor indices, Tensor offsets, Tensor? per_sample_weights, int mode, int[] padding_idx"
)


def _table_schemas() -> dict[str, str]:
    schemas = {}
    for form, tables in _TABLE_FORMS.items():
        learns = form == "adaptive"
        masks = ", Tensor[] group_masks" if learns else ""
        bags = _TABLE_BAGS + (", SymInt seed" if learns else "")
        wants = ", bool mask_grad, bool psw_grad" if learns else ", bool psw_grad"
        mask, pair = ("Tensor group_mask_grads, ", "(%s)") if learns else ("", "%s")
        written = tables.replace("Tensor[]", "Tensor(a!)[]", 1)
        op = f"{form}_embedding_bag_tables"
        schemas[op] = f"({tables}{masks}, {bags}, int bounds_check) -> Tensor"
        schemas[f"{op}_backward"] = (
            f"(Tensor grad, {tables}, {bags}, bool weight_grad{wants})"
            f" -> (Tensor[] rows, Tensor[] grads, {mask}Tensor psw_grad)"
        )
        schemas[f"{op}_update_"] = (
            f"({written}, Tensor(b!)[] state, Tensor grad, {bags}{wants}, int optimizer,"
            f" float[] hyper) -> {pair % (mask + 'Tensor psw_grad')}"
        )
    return schemas


TABLE_LOOKUPS: tuple[str, ...] = tuple(f"{form}_embedding_bag_tables" for form in _TABLE_FORMS)
"""Names of the differentiable lookups in several tables."""

LOOKUPS: tuple[str, ...] = tuple(_LOOKUPS)
"""Names of the differentiable lookups."""

SCHEMAS: dict[str, str] = {**_LOOKUPS, **_BACKWARDS, **_OPTIMIZERS, **_UPDATES, **_table_schemas()}
"""Every operator that a backend may implement, with its schema."""

# The four operators that replace all of the above. T tables hold C blocks together; a call has L
# lookups in T * B bags.
#   blocks         C tensors [n_c, w_c], table after table; a dense table is one block
#   block_counts   of each table; their sum is C
#   dims           widths of the output, or []: each table is as wide as its widest block
#   sizes          []: rows keep the width of their block. Else T tensors: [N_t] of rows, or, with
#                  row_groups, [G_t] or [G_t, Q_t] of groups; such tables have one block each
#   row_groups     [] or T tensors int32 [N_t]
#   masks          [] or T tensors [G_t, D_t]: only gradients reach them, values are never read
#   offsets        None: a plain lookup in one table, [*indices.shape, D]. Else [T * B + 1], and of
#                  one table without include_last_offset [B]
#   pooling        0 sum, 1 mean
#   padding_idx    of each table, -1 for none
#   mask_grads     fp32, flat, table after table; [0] if not asked for
#   state          of each block one after the other, then maybe an int64 step counter
#   hyper          lr, eps, weight_decay, beta1, beta2, step, and maybe 1 for stochastic rounding
_TABLES = "int[] block_counts, int[] dims, Tensor[] sizes, Tensor[] row_groups, SymInt seed"
_BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int pooling, int[] padding_idx,"
    " bool include_last_offset"
)
_STEP = "Tensor(b!)[] state, int optimizer, float[] hyper"

OPERATORS: dict[str, str] = {
    "lookup": (
        f"(Tensor[] blocks, {_TABLES}, Tensor[] masks, {_BAGS}, int bounds_check, bool sparse_grad)"
        " -> Tensor"
    ),
    "lookup_backward": (
        f"(Tensor grad, Tensor[] blocks, {_TABLES}, {_BAGS}, bool weight_grad, bool mask_grad,"
        " bool psw_grad)"
        " -> (Tensor[] rows, Tensor[] grads, Tensor mask_grads, Tensor psw_grad)"
    ),
    "lookup_update_": (
        f"(Tensor(a!)[] blocks, {_TABLES}, Tensor grad, {_BAGS}, bool mask_grad, bool psw_grad,"
        f" bool groups_sorted, {_STEP}) -> (Tensor mask_grads, Tensor psw_grad)"
    ),
    "apply_": f"(Tensor(a!)[] blocks, Tensor[] rows, Tensor[] grads, {_STEP}) -> ()",
}
"""The operators that a backend implements, with their schemas."""

LIBRARY = torch.library.Library("amtl", "DEF")

for _name, _schema in {**SCHEMAS, **OPERATORS}.items():
    LIBRARY.define(_name + _schema)
for _name in LOOKUPS:
    LIBRARY.define(_name + "_densegrad" + SCHEMAS[_name])
# Called by native code, which has no stable way to warn.
LIBRARY.define("_warn_clamped(int value, int position, int rows) -> ()")
