"""A trained model of full size in few bytes: principal components of its table, without training.

Each field has components of its own, for the fields of one table have little in common. An MLP is
all that looks at embeddings, so its first layer takes the bases in, and they cost nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from amtl.data.encoding import Encoder
from amtl.errors import UserError
from amtl.layer.basis import BITS, multiply, principal_basis
from amtl.run import methods
from amtl.run.config import TrainConfig, parse_budget
from amtl.run.model import ClickModel
from amtl.store.dense import to_halves


@torch.no_grad()
def cut_off(
    model: ClickModel, encoder: Encoder, config: TrainConfig, budget: str, bits: int | None = None
) -> nn.Module:
    """The table that takes the place of a trained one of full size: frozen, in `budget`.

    Args:
        model: trained; its first layer is turned in place.
        encoder: of its fields.
        config: of its run.
        budget: share of the bytes of the table, or bytes, as `--budget` has it.
        bits: of a number; None for 8.

    Raises:
        UserError: rows of the table have sizes already, more than an MLP looks at them, or no table
            is as small.
    """
    table, bits = model.table, bits or BITS
    if methods.is_adaptive(table):
        raise UserError(
            f"--budget {budget} is for tables of full size: rows of this run have sizes and are "
            "packed as they are. Leave --budget out, or pack a run of --method fixed"
        )
    if config.backbone != "dnn":
        raise UserError(
            f"--budget {budget} is for runs of --backbone dnn, whose MLP takes components in; this "
            f"one has {config.backbone}: amtl train --budget {budget} sizes its rows in training"
        )
    asked = replace(replace(config, budget_bytes=None), **parse_budget(budget))
    share = asked.with_rows(encoder.num_rows).budget
    weight = methods.table_parameters(table)[0].detach()
    try:
        options = {"bits": bits}
        layer: Any = methods.build_table("rule", encoder, config.dim, budget=share, options=options)
        if share < bits / (8 * weight.itemsize):
            _turn_fields(model, encoder, weight)
        methods.table_parameters(layer)[0].copy_(weight)
        found: nn.Module = layer.freeze().train(table.training)
    except ValueError as error:
        raise UserError(f"--budget {budget}: {error}") from error
    return found


def _turn_fields(model: ClickModel, encoder: Encoder, weight: Tensor) -> None:
    """Rows of each field in its principal components, and the first layer along, in place."""
    linear = model.mlp[0]
    assert isinstance(linear, nn.Linear)
    for field, vocabulary in enumerate(encoder.vocabularies):
        rows = encoder.field_rows(field)
        of_field = weight[rows]
        basis, inverse = principal_basis(of_field, torch.as_tensor(vocabulary.counts))
        multiply(of_field, inverse)
        weight[rows] = of_field
        columns = linear.weight[:, field * model.dim : (field + 1) * model.dim]
        multiply(columns, basis.T)
    # As a trained model's are, so that a file holds them in 16 bits.
    linear.weight.copy_(to_halves(linear.weight))
