"""The registry of methods: what gives values their embeddings, by name.

The product's own are `fixed`, `rule` and `amtl`. `rule` sizes rows by their counts alone. `amtl`
weighs the counts of each field by what the field is worth on held-out data, which a race measures;
with another `parametrization` the twins learn sizes while the table trains. `aml` and `twins` are
names for two of these. Beside them are the peers, methods of the field, see `amtl.peers`.

All put every field into one table with one lookup call, start from the same distribution and are
trained by the same optimizer, so that what differs between runs is the method alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amtl.data.encoding import Encoder
from amtl.errors import UserError
from amtl.layer.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.peers import PEERS, Facts, Part, Peer, served_bytes
from amtl.run.config import OWN
from amtl_kernels import optim

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "twins": ("amtl", {"parametrization": "ordinal"}),
    "aml": ("amtl", {"parametrization": "ordinal", "twins": False}),
}
"""Names for settings of a method: the twins that learn sizes, and a single branch of them."""

TABLE_OPTIMIZERS: dict[str, type[optim.RowOptimizer]] = {
    "adam": optim.Adam,
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "sgd": optim.SGD,
}

DECAY_EVERY = 16
"""Steps between two passes of weight decay over all embeddings, more of a table of more than 16
million numbers, so that a step pays for a million at most."""


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
        method: `fixed` (every row `dim` wide), `rule` (sizes by counts), `amtl` (the same, or
            learned, as `options` say) or one of `PEERS`.
        encoder: fields, sizes and counts.
        dim: full width D.
        budget: stored share of the bytes of N × D for `rule` and `amtl`.
        init_std: deviation of the normal initial weights.
        seed: of the initial weights and of the size noise.
        options: more keyword arguments of `AMTLEmbedding`, or of the peer.

    Raises:
        UserError: for an unknown method, or settings the layer refuses.
    """
    if method not in (*OWN, *PEERS):
        known = ", ".join((*OWN, *ALIASES, *PEERS))
        raise UserError(f"--method {method!r}: choose one of {known}")
    if dim < 1:
        raise UserError(f"--dim must be at least 1, not {dim}")
    if method in PEERS:
        return _build_peer(method, encoder, dim, budget, init_std, seed, options or {})
    bags = any(f.kind == "bag" for f in encoder.fields)
    extra = dict(options or {})
    table: nn.Module
    if method == "fixed" and extra.get("bits") is None:
        if bags:
            table = nn.EmbeddingBag(encoder.num_rows, dim, mode="mean", sparse=True)
        else:
            table = nn.Embedding(encoder.num_rows, dim, sparse=True)
    else:
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
                counts=_counts_with_unseen(encoder),
                field_sizes=encoder.field_sizes,
                **{
                    "budget": budget,
                    "bits": None,
                    "seed": seed,
                    "shared_rows": shared,
                    **extra,
                },
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"--method {method}: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        table_parameters(table)[0].normal_(0.0, init_std, generator=generator)
    return table


def _counts_with_unseen(encoder: Encoder) -> Tensor:
    """Training counts of all rows, int64 `[N]`, for a law of sizes.

    An out-of-vocabulary row that no training value lands on counts as its field's rarest value
    does: what is not seen in training is seen later, and then `amtl.run.unseen` has to have room.
    """
    counts = encoder.counts().clone()
    for field, vocabulary in enumerate(encoder.vocabularies):
        seen = vocabulary.counts[vocabulary.counts > 0]
        if vocabulary.counts[vocabulary.oov_row] == 0 and len(seen):
            counts[encoder.field_rows(field)[vocabulary.oov_row]] = seen.min()
    return counts


def _build_peer(
    method: str,
    encoder: Encoder,
    dim: int,
    budget: float,
    init_std: float,
    seed: int,
    options: dict[str, Any],
) -> Peer:
    facts = Facts(
        encoder.counts(),
        encoder.row_fields(),
        encoder.field_sizes,
        dim,
        int(budget * 4 * encoder.num_rows * dim),
        init_std,
        seed,
    )
    try:
        table = PEERS[method](facts, **options)
        if not table.searches:
            table.require_fit()
    except (TypeError, ValueError) as error:
        raise UserError(f"--method {method}: {error}") from error
    return table


def is_adaptive(table: nn.Module) -> bool:
    """Whether it is the product's layer, whose sizes vary by row."""
    return hasattr(table, "row_dims")


def is_peer(table: nn.Module) -> bool:
    """Whether it is a method of the field, see `amtl.peers`."""
    return isinstance(table, Peer)


def _plain(table: nn.Module) -> bool:
    return not is_adaptive(table) and not is_peer(table)


def table_parameters(table: nn.Module) -> list[nn.Parameter]:
    """The parameters holding embedding values: one weight, or the tiers."""
    if _plain(table):
        return [table.weight]  # type: ignore[list-item]
    return list(table.table_parameters())  # type: ignore[operator]


def mask_parameters(table: nn.Module) -> list[nn.Parameter]:
    """The parameters that decide sizes; empty for `fixed` and `rule` and once frozen."""
    return [] if _plain(table) else list(table.mask_parameters())  # type: ignore[operator]


def row_widths(table: nn.Module) -> Tensor:
    """Stored numbers per row, tier rounding included once frozen: int64 `[N]`.

    Of a peer: what 32 bits hold of the row's bits, nothing where rows share what is stored.
    """
    if isinstance(table, Peer):
        bits = table.row_bits()
        return torch.zeros(table.facts.rows).long() if bits is None else -(-bits.long() // 32)
    if not is_adaptive(table):
        weight = table_parameters(table)[0]
        return torch.full((weight.shape[0],), weight.shape[1])
    return table.row_dims().long().cpu()  # type: ignore[operator]


def is_frozen(table: nn.Module) -> bool:
    """Whether sizes no longer change; always true of `fixed`."""
    return _plain(table) or bool(table.phase == "frozen")


def has_settled_sizes(table: nn.Module) -> bool:
    """Whether a search would change nothing: nothing learns the sizes, and no noise varies them."""
    if is_peer(table) or is_frozen(table) or mask_parameters(table):
        return False
    noise: float = table.options.size_noise  # type: ignore[union-attr, assignment]
    return noise == 0


def number_bits(table: nn.Module) -> int:
    """Bits of a stored number."""
    if few_bits(table):
        return int(table.options.bits)  # type: ignore[union-attr, arg-type]
    return 8 * table_parameters(table)[0].element_size()


def few_bits(table: nn.Module) -> bool:
    """Whether its numbers are stored as codes."""
    return is_adaptive(table) and table.options.bits is not None  # type: ignore[union-attr]


def stored_bytes(table: nn.Module) -> int:
    """Bytes of embedding values when packed, in their dtype; packing takes the row order in."""
    if not _plain(table):
        return int(table.value_bytes())  # type: ignore[operator]
    return sum(p.numel() * p.element_size() for p in table_parameters(table))


def dense_bytes(table: nn.Module) -> int:
    """Bytes of the full N × D table."""
    if not _plain(table):
        return int(table.dense_bytes())  # type: ignore[operator]
    return stored_bytes(table)


def served_parts(table: nn.Module) -> list[Part]:
    """Everything that serving keeps of a table, for `served_bytes`: what methods are compared by.

    Of the product's layer these are its values and step sizes, where its tiers end (integers have
    that beside their step size), and the shared rows.
    """
    if isinstance(table, Peer):
        return table.parts()
    parts = [Part(stored_bytes(table), 8)]
    if is_adaptive(table):
        shared = table.shared_rows
        if table.options.bits is None:  # type: ignore[union-attr]
            tiers = int(row_widths(table).unique().numel())
            parts.append(Part(tiers, 64))  # ends and widths of tiers
        if shared is not None:
            parts.append(Part(len(shared), 32))  # type: ignore[arg-type]
    return parts


def server_bytes(table: nn.Module) -> int:
    """`served_bytes` of `served_parts`."""
    return served_bytes(served_parts(table))


def row_bits(table: nn.Module) -> Tensor | None:
    """Bits stored of each row, int64 `[N]`; None where rows share what is stored."""
    if isinstance(table, Peer):
        return table.row_bits()
    return row_widths(table) * number_bits(table)


def table_optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, decay: float = 0.0
) -> torch.optim.Optimizer:
    """An optimizer that touches only the rows of a batch, and every so often decays all.

    Args:
        name: one of `TABLE_OPTIMIZERS`.
        parameters: `table_parameters()`.
        lr: learning rate.
        decay: weight decay.
    """
    if name not in TABLE_OPTIMIZERS:
        known = ", ".join(TABLE_OPTIMIZERS)
        raise UserError(f"--table-optimizer {name!r}: choose one of {known}")
    given: dict[str, Any] = {}
    if decay:
        every = max(DECAY_EVERY, sum(p.numel() for p in parameters) >> 20)
        given = {"weight_decay": decay, "decay_every": every}
    return TABLE_OPTIMIZERS[name](parameters, lr=lr, **given)


def fuse(table: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Lets the backward apply the optimizer; `fixed` tables and peers have gradients instead.

    Args:
        table: of `build_table`.
        optimizer: `table_optimizer()` of its parameters.
    """
    if isinstance(table, Peer):
        optimizer.register_step_post_hook(lambda *_: table.after_step())
    elif is_adaptive(table):
        table.fuse(optimizer)  # type: ignore[operator]
