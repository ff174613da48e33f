"""The operator schemas, defined once for every backend (``torch.ops.amtl``).

A table is a list of blocks of rows, a call takes a list of tables, and one table is a list of one:
four operators look rows up, make gradients, update tables in the backward, and update rows.
Backends only register implementations. The plain-PyTorch reference is the fallback for devices
without one, so that the package works without any compiled module.
"""

from __future__ import annotations

import torch

# T tables hold C blocks together; a call has L
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
#   steps, bits    tables of few bits, which have no sizes: of each table float32 [P_t], step sizes
#                  of the parts of its rows, and 2, 4, 8 or 16. With half = (2^bits - 1) / 2, code u
#                  of 0..2^bits - 1 stands for (u - half) * step, in float32. Blocks of uint8 [n_c,
#                  w_c * bits / 8] hold codes, the first in the lowest bits, of 16 bits the lower
#                  byte first, at any address; they have no gradient, and output, its gradient and
#                  per_sample_weights are float32. Blocks of floats are rounded as they are read, to
#                  code clamp(round(x / step + half), 0, 2 * half); the other operators know nothing
#                  of it, so gradients pass straight through. lookup_update_ updates the number x
#                  that a code stands for as that of a table of floats, by SGD or row-wise Adagrad
#                  only, and stores code floor(p) or floor(p) + 1 of p = clamp(x / step + half, 0, 2
#                  * half), NaN being 0: the second if r < (p - floor(p)) * 2^24, r the upper 24 of
#                  the random bits (rounding.py) of the number's row in its block, its column and
#                  the step
#   step_ends      table after table the first row after each part, each within a block; None: every
#                  block is a part. The three are last, and None by default: a call without them
#                  does not even pass them
# None for a list is the same as []: AOTInductor hands an empty list over as None.
_TABLES = "int[] block_counts, int[]? dims, Tensor[]? sizes, Tensor[]? row_groups, SymInt seed"
_BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int pooling, int[] padding_idx,"
    " bool include_last_offset"
)
_WISHES = "bool mask_grad, bool psw_grad"
_STEP = "Tensor(b!)[] state, int optimizer, float[] hyper"
_FEW_BITS = "Tensor[]? steps=None, int[]? bits=None, int[]? step_ends=None"

SCHEMAS: dict[str, str] = {
    "lookup": (
        f"(Tensor[] blocks, {_TABLES}, Tensor[]? masks, {_BAGS}, int bounds_check,"
        f" bool sparse_grad, {_FEW_BITS}) -> Tensor"
    ),
    "lookup_backward": (
        f"(Tensor[] blocks, {_TABLES}, Tensor grad, {_BAGS}, bool weight_grad, {_WISHES})"
        " -> (Tensor[] rows, Tensor[] grads, Tensor mask_grads, Tensor psw_grad)"
    ),
    "lookup_update_": (
        f"(Tensor(a!)[] blocks, {_TABLES}, Tensor grad, {_BAGS}, {_WISHES}, bool groups_sorted,"
        f" {_STEP}, {_FEW_BITS}) -> (Tensor mask_grads, Tensor psw_grad)"
    ),
    "apply_": f"(Tensor(a!)[] blocks, Tensor[] rows, Tensor[] grads, {_STEP}) -> ()",
}
"""The operators that a backend implements, with their schemas."""

DEFINITIONS = [
    *(name + schema for name, schema in SCHEMAS.items()),
    # The address of what native code on the CPU knows of one table (`_planned.py`).
    f"_plan(Tensor[] blocks, {_TABLES}, {_FEW_BITS}) -> int",
    # Raises what lookups before have found on the device of `like`, if that is known by now.
    "_raise_found(Tensor like) -> ()",
    # Called by native code, which has no stable way to warn in Python.
    "_warn_clamped(int value, int position, int rows) -> ()",
]
"""All operators. Programs without Python have them from the native module, which is built with
these lines (`csrc/torch/define.cpp`)."""

LIBRARY = torch.library.Library("amtl", "DEF")

for _definition in DEFINITIONS:
    LIBRARY.define(_definition)
