"""The three ways to give values their embedding sizes: fixed, rule and amtl.

`rule` sizes rows by their counts alone. `amtl` weighs the counts of each field by what the field
is worth on held-out data, which a race measures; with another `parametrization` the twins learn
sizes while the table trains.

All three put every field into one table with one lookup call, start from the same distribution
and are trained by the same optimizer, so that what differs between runs is the sizes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amtl.data.encoding import Encoder
from amtl.errors import UserError

METHODS = ("amtl", "rule", "fixed")
TABLE_OPTIMIZERS = ("adam", "adagrad", "rowwise_adagrad", "sgd")


def build_table(
    method: str,
    encoder: Encoder,
    dim: int,
    *,
    budget: float = 0.4,
    init_std: float = 0.01,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """An embedding over all fields of `encoder`, a bag if one of them is multi-valued.

    Args:
        method: `fixed` (every row `dim` wide), `rule` (size by a power of the count, scaled to the
            budget) or `amtl` (learned sizes).
        encoder: fields, sizes and counts.
        dim: full width D.
        budget: stored share of the bytes of N × D for `rule` and `amtl`.
        init_std: deviation of the normal initial weights.
        seed: of the initial weights and of the size noise.
        options: more keyword arguments of `AMTLEmbedding`.

    Raises:
        UserError: for an unknown method, or settings the layer refuses.
    """
    if method not in METHODS:
        raise UserError(f"--method {method!r}: choose one of {', '.join(METHODS)}")
    if dim < 1:
        raise UserError(f"--dim must be at least 1, not {dim}")
    bags = any(f.kind == "bag" for f in encoder.fields)
    extra = dict(options or {})
    table: nn.Module
    if method == "fixed" and extra.get("bits") is None:
        if bags:
            table = nn.EmbeddingBag(encoder.num_rows, dim, mode="mean", sparse=True)
        else:
            table = nn.Embedding(encoder.num_rows, dim, sparse=True)
    else:
        from amtl.layer.embedding import AMTLEmbedding, AMTLEmbeddingBag

        if method == "fixed":
            budget = 1.0
        if method != "amtl":
            extra["parametrization"] = "rule"
        if extra.setdefault("parametrization", "rule") == "rule":
            extra.setdefault("size_noise", 0.0)
        if bags:
            extra["mode"] = "mean"
        shared = [int(encoder.field_rows(f)[v.oov_row]) for f, v in enumerate(encoder.vocabularies)]
        try:
            table = (AMTLEmbeddingBag if bags else AMTLEmbedding)(
                encoder.num_rows,
                dim,
                sparse=True,
                counts=encoder.counts(),
                field_sizes=encoder.field_sizes,
                **{"budget": budget, "seed": seed, "shared_rows": shared, **extra},
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"--method {method}: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        table_parameters(table)[0].normal_(0.0, init_std, generator=generator)
    return table


def is_adaptive(table: nn.Module) -> bool:
    """Whether sizes vary by row."""
    return not isinstance(table, (nn.Embedding, nn.EmbeddingBag)) or hasattr(table, "row_dims")


def table_parameters(table: nn.Module) -> list[nn.Parameter]:
    """The parameters holding embedding values: one weight, or the tiers."""
    if is_adaptive(table):
        return list(table.table_parameters())  # type: ignore[operator]
    return [table.weight]  # type: ignore[list-item]


def mask_parameters(table: nn.Module) -> list[nn.Parameter]:
    """The parameters that decide sizes; empty for `fixed` and `rule` and once frozen."""
    return list(table.mask_parameters()) if is_adaptive(table) else []  # type: ignore[operator]


def row_widths(table: nn.Module) -> Tensor:
    """Stored numbers per row, tier rounding included once frozen: int64 `[N]`."""
    if not is_adaptive(table):
        weight = table_parameters(table)[0]
        return torch.full((weight.shape[0],), weight.shape[1])
    return table.row_dims().long().cpu()  # type: ignore[operator]


def is_frozen(table: nn.Module) -> bool:
    """Whether sizes no longer change; always true of `fixed`."""
    return not is_adaptive(table) or bool(table.phase == "frozen")


def has_settled_sizes(table: nn.Module) -> bool:
    """Whether a search would change nothing: nothing learns the sizes, and no noise varies them."""
    if is_frozen(table) or mask_parameters(table):
        return False
    noise: float = table.options.size_noise  # type: ignore[union-attr, assignment]
    return noise == 0


def number_bits(table: nn.Module) -> int:
    """Bits of a stored number."""
    if is_adaptive(table) and table.options.bits is not None:  # type: ignore[union-attr]
        return int(table.options.bits)  # type: ignore[union-attr, arg-type]
    return 8 * table_parameters(table)[0].element_size()


def stored_bytes(table: nn.Module) -> int:
    """Bytes of embedding values when packed, in their dtype; packing takes the row order in."""
    if is_adaptive(table):
        return int(table.value_bytes())  # type: ignore[operator]
    return sum(p.numel() * p.element_size() for p in table_parameters(table))


def dense_bytes(table: nn.Module) -> int:
    """Bytes of the full N × D table."""
    if is_adaptive(table):
        return int(table.dense_bytes())  # type: ignore[operator]
    return stored_bytes(table)


def table_optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """An optimizer that touches only the rows of a batch.

    Args:
        name: one of `TABLE_OPTIMIZERS`.
        parameters: `table_parameters()`.
        lr: learning rate.
    """
    from amtl_kernels import optim

    classes: dict[str, Any] = {
        "adam": optim.Adam,
        "adagrad": optim.Adagrad,
        "rowwise_adagrad": optim.RowwiseAdagrad,
        "sgd": optim.SGD,
    }
    if name not in classes:
        raise UserError(f"--table-optimizer {name!r}: choose one of {', '.join(classes)}")
    optimizer: torch.optim.Optimizer = classes[name](parameters, lr=lr)
    return optimizer


def fuse(table: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Lets the backward apply the optimizer; `fixed` tables have gradients instead.

    Args:
        table: of `build_table`.
        optimizer: `table_optimizer()` of its parameters.
    """
    if is_adaptive(table):
        table.fuse(optimizer)  # type: ignore[operator]
