"""What convert and freeze say where a model asks for something else than it gets."""

from __future__ import annotations

import warnings

import amtl
import pytest
import torch
from torch import nn


def test_freezing_a_model_without_layers_is_warned_of():
    model = nn.ModuleDict({"item": nn.Embedding(50, 8)})
    amtl.convert(model["item"], torch.arange(50), budget=0.3)
    with pytest.warns(UserWarning, match="no AMTL layers.*it returns the layer") as told:
        assert amtl.freeze(model) is model
    assert told[0].filename == __file__
    model["item"] = amtl.convert(model["item"], torch.arange(50), budget=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amtl.freeze(amtl.freeze(model))


def shared():
    table = nn.Embedding(50, 8)
    return nn.ModuleDict({"query": nn.Sequential(table), "doc": nn.Sequential(table)})


@pytest.mark.parametrize("names", [None, ["query.0"], ["doc.0"]])
def test_counts_under_both_names_of_a_table_are_refused_if_they_differ(names):
    model, up = shared(), torch.arange(50)
    with pytest.raises(ValueError, match=r"'doc\.0'.*one table.*sum, under one"):
        amtl.convert(model, {"query.0": up, "doc.0": up.flip(0)}, names=names)
    assert not amtl.layers(model)
    amtl.convert(model, {"query.0": up, "doc.0": up.float()}, names=names, budget=0.3)
    assert model["query"][0] is model["doc"][0] is amtl.layers(model)["query.0"]
