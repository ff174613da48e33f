"""What files say of tables beside their rows: no more than it takes, and all of it."""

from __future__ import annotations

import json
from dataclasses import asdict

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, SearchOptions
from torch import nn

DEFAULTS = {
    "budget": 0.4,
    "bits": None,
    "masters": True,
    "parametrization": "rule",
    "min_dim": 0,
    "granularity": 1,
    "tier_width": None,
    "temperature": 1.0,
    "final_temperature": None,
    "kernel_width": 0.3,
    "size_noise": 0.0,
    "noise_quantiles": 64,
    "learns_every": 1,
    "freeze_at": 0.4,
    "capacity_bits": 4.0,
    "init_exponent": None,
    "field_weights": None,
    "mask_hidden": (32,),
    "twins": True,
    "weight_std": 1.0,
    "bounds_check": "raise",
    "seed": 0,
}
GIVEN = [
    {},
    {"parametrization": "ordinal"},
    {"parametrization": "ordinal", "size_noise": 0.0, "min_dim": 2},
    {"parametrization": "free"},
    {"parametrization": "free", "budget": None, "min_dim": 0},
    {"bits": 8, "masters": False},
    {"parametrization": "ordinal", "learns_every": 4},
    {"field_weights": [2.0, 1.0], "mask_hidden": [8, 8], "init_exponent": 0.5, "seed": 3},
]


def test_files_rely_on_the_defaults():
    assert asdict(SearchOptions()) == DEFAULTS
    learned = [SearchOptions(parametrization=p) for p in ("ordinal", "free")]
    assert [(o.min_dim, o.size_noise) for o in learned] == [(0, 0.5), (1, 0.0)]


@pytest.mark.parametrize("given", GIVEN)
def test_options_are_found_again_from_those_that_were_given(given):
    options = SearchOptions(**given)
    written = json.loads(json.dumps(options.given()))
    assert written.keys() <= given.keys() and SearchOptions(**written) == options


OPTIONS = [
    {"budget": 0.3, "bits": 4, "granularity": 2, "capacity_bits": 3.0, "bounds_check": "clamp"},
    {"budget": 0.3, "bits": None, "shared_rows": [7], "seed": 5},
    {"budget": 0.5, "bits": None, "parametrization": "ordinal", "size_noise": 0.0},
]


def layer_of(options):
    torch.manual_seed(0)
    return AMTLEmbedding(60, 8, counts=range(60), **options).eval().freeze()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_loaded_layer_thaws_as_the_saved_one(tmp_path, options):
    layer = layer_of(options)
    amtl.save(layer, tmp_path / "layer.safetensors")
    loaded = amtl.load(tmp_path / "layer.safetensors").eval()
    rows = torch.arange(60)
    assert loaded.options == layer.options and torch.equal(loaded(rows), layer(rows))
    loaded.thaw(counts=range(60))
    layer.thaw()
    assert loaded.options == layer.options and torch.equal(loaded.row_dims(), layer.row_dims())


@pytest.mark.parametrize("options", OPTIONS)
def test_files_that_name_every_option_open_as_they_did(options):
    layer = layer_of(options)
    layer = layer if layer.options.bits is None else layer.to_integers()
    config = layer.config()
    whole = {"full_rows": 60, "shared_rows": None, **config, "options": asdict(layer.options)}
    whole = json.loads(json.dumps(whole))
    again = AMTLEmbedding.from_config(whole, list(layer.blocks), layer.row_order, layer.steps)
    assert again.options == layer.options and again.full_rows == 60
    assert json.loads(json.dumps(again.config())) == json.loads(json.dumps(config))


def test_a_layer_that_handed_its_order_over_knows_its_former_rows(tmp_path):
    layer = layer_of(OPTIONS[1])
    layer.absorb_order()
    amtl.save(layer, tmp_path / "layer.safetensors")
    loaded = amtl.load(tmp_path / "layer.safetensors")
    assert loaded.full_rows == 60 > loaded.num_embeddings


@pytest.mark.parametrize("budget", [0.125, 0.3])
def test_files_of_many_small_tables_hold_little_beside_them(tmp_path, budget):
    model = nn.ModuleList([nn.Embedding(rows, 4) for rows in [5, 7, 8, 25] * 5])
    counts = {str(i): torch.arange(len(table.weight), 0, -1) for i, table in enumerate(model)}
    amtl.convert(model, counts, budget=budget)
    amtl.save(amtl.freeze(model), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 900 * len(model)
