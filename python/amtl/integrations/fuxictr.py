"""FuxiCTR: models on its `BaseModel` that look features up in `FeatureEmbedding`.

    model = DeepFM(feature_map, ...)                  # compiles itself
    fuxictr.convert(model, fuxictr.count(model, train_gen), budget=0.125)
    fuxictr.freeze(model)
    model.fit(train_gen, epochs=10, validation_data=valid_gen)
    amtl.save(model, "model.safetensors")
    ...
    fuxictr.load("model.safetensors", DeepFM(feature_map, ...)).predict(test_gen)

Converted are the tables of categorical and sequence features, in every `FeatureEmbedding` of the
model; features that share one go on sharing it. Tables of width 1 (logistic regression) and
pretrained ones stay as they are. Tables of one width in one `FeatureEmbedding` go into one
`AMTLEmbeddingCollection`, under one budget: its categorical features are then looked up in one
call. `model.save_weights` and `load_weights` work as before.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from amtl.integrations import joining
from amtl.integrations.joining import Owner
from amtl.integrations.optimizers import add_masks, move_to_layers
from amtl.layer import conversion
from amtl.layer.collection import CollectedTable
from amtl.store.packed import open_packed

_Model = TypeVar("_Model", bound=nn.Module)

_DICT = "FeatureEmbeddingDict"
"""The class that looks features up, known by name: a model of none needs no FuxiCTR to be one."""


def count(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """How often each row is looked up in one pass over the training split.

    Args:
        model: of FuxiCTR.
        batches: the training split as `model.fit` takes it: tensors by feature name.

    Returns:
        int64 [N] by feature, for one of the features that share a table, summed over them. The
        padding row of a table is not counted.

    Raises:
        TypeError: not a model of FuxiCTR.
        ValueError: an id out of range.
    """
    tables = _tables(model)
    feature_of = {feature: features[0] for features, _ in tables for feature in features}
    rows = {features[0]: modules[0].num_embeddings for features, modules in tables}
    padding = {features[0]: modules[0].padding_idx for features, modules in tables}
    counts = {name: torch.zeros(n, dtype=torch.int64) for name, n in rows.items()}
    for batch in batches:
        for feature, name in feature_of.items():
            if feature not in batch:
                continue
            ids = torch.as_tensor(batch[feature]).long().flatten()
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows[name]:
                raise ValueError(
                    f"feature {feature!r} has ids from {int(ids.min())} to {int(ids.max())}; its "
                    f"table has {rows[name]} rows"
                )
            counts[name] += torch.bincount(ids.cpu(), minlength=rows[name])
    for name, row in padding.items():
        if row is not None:
            counts[name][row] = 0
    return counts


def convert(
    model: _Model,
    counts: Mapping[str, Any],
    budget: float | Mapping[str, float | None] | None = 0.4,
    *,
    mask_lr: float | None = None,
    collection: bool | None = None,
    **options: Any,
) -> _Model:
    """Replace tables of a trained or untrained model by AMTL layers, in place.

    The model's optimizer gets the parameters that learn the sizes. Its embedding regulariser goes
    on over what the layers store; neither it nor that of the network touches the sizes.

    Args:
        model: of FuxiCTR, compiled, as its constructor leaves it.
        counts: training counts [N] by feature, as from `count`; for a shared table under the name
            of any one of its features. Others are left alone.
        budget: stored fraction of all these tables together, or by feature; see `amtl.convert`.
        mask_lr: learning rate of the sizes; None: the optimizer's own, as for all parameters.
        collection: True: one collection of all these tables, `amtl_collection` of the
            `FeatureEmbeddingDict` that has them, which takes over weights and the optimizer's
            state; False: a layer for each; None: a collection if there are several of one width
            in one `FeatureEmbeddingDict`, with equal padding rows and no budgets by feature.
        **options: as in `amtl.convert`, or those of the collection; a `shared_rows` by name goes by
            feature, too.

    Returns:
        The model.

    Raises:
        TypeError: not a model of FuxiCTR.
        ValueError: an unknown feature, two for one table, tables that do not go into one
            collection, or what `amtl.convert` refuses. Nothing is replaced then.
    """
    tables = _tables(model)
    place_of = {id(module): name for name, module in model.named_modules()}
    chosen: dict[str, list[Any]] = {}
    for name in counts:
        found = next((t for t in tables if name in t[0]), None)
        if found is None:
            known = [features[0] for features, _ in tables]
            raise ValueError(f"the model has no table of {name!r} to convert; it has {known}")
        features, modules = found
        twice = [other for other in features if other in counts]
        if len(twice) > 1:
            raise ValueError(
                f"features {twice} share a table: give the sum of their counts under one name"
            )
        chosen[name] = modules
    named: Any = model
    optimizer = getattr(named, "optimizer", None)
    owners = _owners(model, chosen)
    if collection is None:
        joins = len(owners) == 1 and not isinstance(budget, Mapping)
        collection = joins and joining.fit(owners[0], _single(chosen), options)
    if collection:
        if len(owners) != 1:
            raise ValueError(
                f"the tables of {list(chosen)} are in {len(owners)} FeatureEmbeddings, but a "
                "collection is of one: convert those of each by themselves"
            )
        if isinstance(budget, Mapping):
            raise ValueError("a collection has one budget; budgets by feature make layers")
        joined = _single(chosen)
        made = joining.collect(model, owners[0], joined, counts, budget, optimizer, options)
        if optimizer is not None:
            add_masks(optimizer, {made.name: made}, mask_lr)
        return model
    dotted = {name: [place_of[id(m)] for m in modules] for name, modules in chosen.items()}
    if isinstance(options.get("shared_rows"), Mapping):
        options["shared_rows"] = _spread(options["shared_rows"], dotted)
    if isinstance(budget, Mapping):
        budget = _spread(budget, dotted)
    conversion.convert(model, _spread(counts, dotted), budget, **options)
    if optimizer is not None:
        layers = conversion.layers(model)
        new = {place: layers[place] for places in dotted.values() for place in places}
        add_masks(optimizer, new, mask_lr)
    return model


def freeze(model: _Model) -> _Model:
    """Fix the sizes, in the model's optimizer too, which keeps its state.

    Raises:
        ValueError: the optimizer does not hold a table that trains.
    """
    return conversion.freeze(model, getattr(model, "optimizer", None))


def load(path: str | os.PathLike[str], model: _Model) -> _Model:
    """Load what `amtl.save` wrote into a newly built model; its optimizer follows.

    Args:
        path: the file.
        model: as its constructor gives it.

    Returns:
        The model, its tables frozen: it predicts and trains on.

    Raises:
        TypeError: not a model of FuxiCTR.
        ValueError: the model has AMTL layers already.
        PackedFileError: see `amtl.load`.
    """
    if conversion.layers(model):
        raise ValueError("the model has AMTL layers already; load into a newly built one")
    _tables(model)
    dicts = {name: m for name, m in model.named_modules() if type(m).__name__ == _DICT}
    layers = joining.load(
        open_packed(path),
        model,
        lambda place: _owner(dicts[place]) if place in dicts else None,
    )
    named: Any = model
    if getattr(named, "optimizer", None) is not None:
        move_to_layers(named.optimizer, layers)
    return model


def _tables(model: nn.Module) -> list[tuple[list[str], list[Any]]]:
    """What can be converted: features that share, and their table in each `FeatureEmbedding`."""
    dicts: list[Any] = [module for module in model.modules() if type(module).__name__ == _DICT]
    if not dicts or not hasattr(model, "regularization_loss"):
        raise TypeError(
            f"{type(model).__name__} is not a model of FuxiCTR with a FeatureEmbedding; "
            "amtl.convert() takes any module"
        )
    found: dict[tuple[str, ...], list[Any]] = {}
    for each in dicts:
        features: dict[Any, list[str]] = {}
        for name, table in each.embedding_layers.items():
            if type(table) is nn.Embedding and table.embedding_dim > 1:
                features.setdefault(table, []).append(name)
        for table, names in features.items():
            found.setdefault(tuple(names), []).append(table)
    return [(list(names), modules) for names, modules in found.items()]


def _owners(model: nn.Module, chosen: Mapping[str, Sequence[Any]]) -> list[Owner]:
    """Where these tables are looked up."""
    modules = {id(module) for each in chosen.values() for module in each}
    dicts: list[Any] = [module for module in model.modules() if type(module).__name__ == _DICT]
    return [
        _owner(each)
        for each in dicts
        if any(id(table) in modules for table in each.embedding_layers.values())
    ]


def _owner(module: Any) -> Owner:
    from fuxictr.pytorch.layers import FeatureEmbeddingDict

    return Owner(module, module.embedding_layers, "forward", FeatureEmbeddingDict.forward, _forward)


def _single(chosen: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The table of each feature, of features that are looked up in one place."""
    return {name: modules[0] for name, modules in chosen.items()}


def _forward(
    module: Any,
    inputs: Mapping[str, Tensor],
    feature_source: Sequence[str] | str = (),
    feature_type: Sequence[str] | str = (),
) -> OrderedDict[str, Tensor]:
    """FuxiCTR's own, with one lookup for all single-valued features in the collection."""
    from fuxictr.utils import not_in_whitelist

    layers, specs = module.embedding_layers, module._feature_map.features

    def collected(feature: str) -> bool:
        spec = specs[feature]
        if spec["type"] != "categorical" or feature not in layers:
            return False
        if feature_source and not_in_whitelist(spec["source"], feature_source):
            return False
        if feature_type and not_in_whitelist(spec["type"], feature_type):
            return False
        return isinstance(layers[feature], CollectedTable)

    own = type(module).forward
    together = [feature for feature in inputs if collected(feature)]
    if len({inputs[feature].shape for feature in together}) != 1:
        whole: OrderedDict[str, Tensor] = own(module, inputs, feature_source, feature_type)
        return whole
    home = layers[together[0]].collection
    # In the order of the collection, whose tables are then not picked one by one.
    together.sort(key=lambda feature: home.names.index(layers[feature].name))
    rows = torch.stack([inputs[feature].long() for feature in together], -1)
    out = home.lookup([layers[feature].name for feature in together], rows)
    found = dict(zip(together, out.unbind(-2), strict=True))
    for feature in together:
        if feature in module.feature_encoders:
            found[feature] = module.feature_encoders[feature](found[feature])
    rest = {feature: value for feature, value in inputs.items() if feature not in found}
    found.update(own(module, rest, feature_source, feature_type))
    return OrderedDict((feature, found[feature]) for feature in inputs if feature in found)


def _spread(by_feature: Mapping[str, Any], dotted: Mapping[str, list[str]]) -> dict[str, Any]:
    return {place: by_feature[name] for name in by_feature for place in dotted.get(name, [])}


def regularise_layers(model: nn.Module) -> None:
    """Let the regularisers of FuxiCTR, of the model and of models in it, see layers as they should.

    That of embeddings goes on over what the layers store; none touches the sizes. `amtl.convert`
    and `amtl.load` see to it by themselves. Copies of the model keep this.
    """
    for module in model.modules():
        own = getattr(type(module), "regularization_loss", None)
        if own is not None and hasattr(module, "_embedding_regularizer"):
            vars(module)["regularization_loss"] = functools.partial(_regularization_loss, module)


def _regularization_loss(model: Any) -> Any:
    """The model's own, which goes over all that trains, the parameters of the sizes left out."""
    heads = [layer.head for layer in conversion.layers(model).values() if layer.head is not None]
    hidden = [p for head in heads for p in head.parameters() if p.requires_grad]
    tables: list[nn.Parameter] = []
    if any(kind.__name__ == "MultiTaskModel" for kind in type(model).__mro__):
        # It knows embeddings by their type, and would take layers for a part of the network.
        tables = [p for p in conversion.table_parameters(model) if p.requires_grad]
    for parameter in (*hidden, *tables):
        parameter.requires_grad_(False)
    try:
        loss = type(model).regularization_loss(model)
    finally:
        for parameter in (*hidden, *tables):
            parameter.requires_grad_(True)
    if tables:
        from fuxictr.pytorch.torch_utils import get_regularizer

        for p, rate in get_regularizer(model._embedding_regularizer):
            loss = loss + rate / p * sum(torch.norm(table, p) ** p for table in tables)
    return loss
