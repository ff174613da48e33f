"""What the optimizer that a library keeps for its model has to follow."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from amtl.layer.table import AMTLTable


def add_masks(optimizer: Optimizer, layers: Mapping[str, AMTLTable], lr: float | None) -> None:
    """Add what learns the sizes, in a group of its own; at the optimizer's rate for `lr=None`."""
    masks = [p for layer in layers.values() for p in layer.mask_parameters()]
    if masks:
        optimizer.add_param_group({"params": masks, **({} if lr is None else {"lr": lr})})


def move_to_layers(optimizer: Optimizer, layers: Mapping[nn.Parameter, AMTLTable]) -> None:
    """Hold the tables of layers in place of former weights, whose state goes.

    Args:
        optimizer: changed in place.
        layers: by the weight that was looked up in the layer's place.
    """
    for group in optimizer.param_groups:
        old = group["params"]
        parts = [layers[p].table_parameters() if p in layers else [p] for p in old]
        # A collection takes the place of several.
        group["params"] = list({id(p): p for part in parts for p in part}.values())
    for weight in layers:
        optimizer.state.pop(weight, None)
