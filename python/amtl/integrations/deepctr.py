"""deepctr-torch: DeepFM, DCN, xDeepFM, AutoInt, DIN, WDL and whatever else is on its `BaseModel`.

    model.compile("adam", "binary_crossentropy")
    deepctr.convert(model, deepctr.count(model, train_x), budget=0.125)
    deepctr.freeze(model)
    model.fit(train_x, train_y, epochs=10)
    amtl.save(model, "model.safetensors")
    ...
    deepctr.load("model.safetensors", DeepFM(...)).predict(x)

Converted are the tables in `model.embedding_dict`, which sequence features and features with a
common `embedding_name` look up too. Those of one width go into one `AMTLEmbeddingCollection`, under
one budget: `input_from_feature_columns` then looks all single-valued features up in one call. The
tables of width 1 of the linear part stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from amtl.integrations import joining
from amtl.integrations.joining import COLLECTION, Owner
from amtl.integrations.optimizers import add_masks, move_to_layers
from amtl.layer import conversion
from amtl.layer.collection import CollectedTable
from amtl.layer.table import AMTLTable
from amtl.store.packed import open_packed

_Model = TypeVar("_Model", bound=nn.Module)

_EXACT = 2**24
"""Whole numbers up to here are exact as float32."""


def count(model: nn.Module, x: Mapping[str, Any] | Sequence[Any]) -> dict[str, Tensor]:
    """How often each row is looked up in data as `model.fit` takes them.

    Args:
        model: of deepctr-torch.
        x: the training split: arrays by feature name, or in the order of `model.feature_index`.

    Returns:
        int64 [N] by table, summed over the features that share it. Positions that only fill a
        sequence up (beyond its length, or of id 0 where it has none) are not counted.

    Raises:
        TypeError: not a model of deepctr-torch.
        ValueError: an id out of range.
    """
    import numpy as np

    tables = _tables(model)
    named: Any = model
    columns = x if isinstance(x, Mapping) else dict(zip(named.feature_index, x, strict=False))

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.array(columns[name], dtype=np.int64))

    counts = {name: torch.zeros(t.num_embeddings, dtype=torch.int64) for name, t in tables.items()}
    for feature in named.dnn_feature_columns:
        table = getattr(feature, "embedding_name", None)
        if table not in counts:
            continue
        ids = column(feature.name)
        if hasattr(feature, "maxlen"):
            ids = ids.reshape(-1, feature.maxlen)
            if feature.length_name is None:
                ids = ids[ids != 0]
            else:
                lengths = column(feature.length_name).reshape(-1, 1)
                ids = ids[torch.arange(feature.maxlen) < lengths]
        rows = len(counts[table])
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise ValueError(
                f"feature {feature.name!r} has ids from {int(ids.min())} to {int(ids.max())}; its "
                f"table {table!r} has {rows} rows"
            )
        counts[table] += torch.bincount(ids.flatten(), minlength=rows)
    return counts


def convert(
    model: _Model,
    counts: Mapping[str, Any],
    budget: float | None = 0.4,
    *,
    mask_lr: float | None = None,
    collection: bool | None = None,
    **options: Any,
) -> _Model:
    """Replace tables of a trained or untrained model by AMTL layers, in place.

    Its embedding regulariser goes on over what the layers store: the whole table in the search,
    the tiers once frozen. Call it before or after `model.compile`: an optimizer that is there gets
    the parameters that learn the sizes, one that is built later finds them.

    Args:
        model: of deepctr-torch.
        counts: training counts [N] by table, as from `count`; others are left alone.
        budget: stored fraction of all these tables together, see `amtl.SearchOptions`.
        mask_lr: learning rate of the sizes; None: the optimizer's own, as for all parameters.
        collection: True: one collection of all these tables, `model.amtl_collection`, which takes
            over weights and the optimizer's state; False: a layer for each; None: a collection
            if there are several, of one width.
        **options: as in `amtl.convert`, or those of the collection; a `shared_rows` by name goes by
            table, too.

    Returns:
        The model.

    Raises:
        TypeError: not a model of deepctr-torch.
        ValueError: an unknown table, a table with more rows than float32 can tell apart, `mask_lr`
            before `model.compile`, tables that do not go into one collection, or what
            `amtl.convert` refuses. Nothing is replaced then.
    """
    tables = _tables(model)
    named: Any = model
    for name in counts:
        if name not in tables:
            raise ValueError(f"the model has no table {name!r} to convert; it has {list(tables)}")
        if tables[name].num_embeddings - 1 > _EXACT:
            raise ValueError(
                f"table {name!r} has {tables[name].num_embeddings:,} rows, but deepctr-torch "
                f"passes ids as float32, which tells whole numbers apart up to {_EXACT:,} only: "
                "larger ids look up a neighbour's row, with or without amtl. Merge rare values "
                "or split the feature"
            )
    optimizer = getattr(named, "optim", None)
    if mask_lr is not None and optimizer is None:
        raise ValueError(
            "mask_lr is for the optimizer, which is not there yet: call model.compile() first, "
            "or leave it out and sizes learn at the rate of the optimizer that is built then"
        )
    chosen = {name: tables[name] for name in counts}
    owner = _owner(model)
    if collection or (collection is None and joining.fit(owner, chosen, options)):
        made = joining.collect(model, owner, chosen, counts, budget, optimizer, options)
        _penalise_layers(named, {table.weight: made for table in chosen.values()})
        if optimizer is not None:
            add_masks(optimizer, {COLLECTION: made}, mask_lr)
        return model
    if isinstance(options.get("shared_rows"), Mapping):
        options["shared_rows"] = _dotted(options["shared_rows"])
    before = {name: tables[name].weight for name in counts}
    conversion.convert(model, _dotted(counts), budget, **options)
    _penalise_layers(named, {weight: _get(named, name) for name, weight in before.items()})
    if optimizer is not None:
        add_masks(optimizer, {name: _get(named, name) for name in counts}, mask_lr)
    return model


def freeze(model: _Model) -> _Model:
    """Fix the sizes, in the optimizer of `model.compile` too, which keeps its state.

    Between two calls of `model.fit`, or in a callback within one.

    Raises:
        ValueError: the optimizer does not hold a table that trains.
    """
    return conversion.freeze(model, getattr(model, "optim", None))


def load(path: str | os.PathLike[str], model: _Model) -> _Model:
    """Load what `amtl.save` wrote into a newly built model; regulariser and optimizer follow.

    Args:
        path: the file.
        model: as its constructor gives it, compiled or not.

    Returns:
        The model, its tables frozen: it predicts and trains on.

    Raises:
        TypeError: not a model of deepctr-torch.
        ValueError: the model has AMTL layers already.
        PackedFileError: see `amtl.load`.
    """
    if conversion.layers(model):
        raise ValueError("the model has AMTL layers already; load into a newly built one")
    _tables(model)
    named: Any = model
    layers = joining.load(open_packed(path), model, lambda place: None if place else _owner(model))
    _penalise_layers(named, layers)
    if getattr(named, "optim", None) is not None:
        move_to_layers(named.optim, layers)
    return model


class _Stored:
    """Weights to penalise, as deepctr-torch lists them, with layers in the place of their tables.

    What a layer stores is asked for each time: it changes with `freeze`, `thaw` and loading.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = list(items)

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            if isinstance(item, AMTLTable):
                yield from item.table_parameters()
            else:
                yield item


def _tables(model: nn.Module) -> dict[str, Any]:
    """What can be converted, by the key in `embedding_dict`."""
    if not (hasattr(model, "embedding_dict") and hasattr(model, "regularization_weight")):
        raise TypeError(
            f"{type(model).__name__} is not a model of deepctr-torch (no embedding_dict or no "
            "regularization_weight); amtl.convert() takes any module"
        )
    tables: Any = model.embedding_dict
    return {name: table for name, table in tables.items() if table.embedding_dim > 1}


def _get(model: Any, name: str) -> Any:
    return model.embedding_dict[name]


def _dotted(by_table: Mapping[str, Any]) -> dict[str, Any]:
    return {f"embedding_dict.{name}": value for name, value in by_table.items()}


def _penalise_layers(model: Any, replaced: Mapping[nn.Parameter, AMTLTable]) -> None:
    """Let the regulariser have layers in place of their former weights, each once."""
    layers = {id(weight): layer for weight, layer in replaced.items()}

    def penalised(weights: Iterable[Any]) -> Any:
        # A weight may come as (name, weight).
        values = [(w, w[1] if isinstance(w, tuple) else w) for w in weights]
        if not any(id(value) in layers for _, value in values):
            return weights
        kept = [layers.get(id(value), w) for w, value in values]
        return _Stored({id(each): each for each in kept}.values())

    model.regularization_weight = [
        (penalised(weights), l1, l2) for weights, l1, l2 in model.regularization_weight
    ]


def _owner(model: Any) -> Owner:
    from deepctr_torch.models.basemodel import BaseModel

    method = "input_from_feature_columns"
    own = getattr(BaseModel, method)
    return Owner(model, model.embedding_dict, method, own, _input_from_feature_columns)


def _input_from_feature_columns(
    model: Any, X: Tensor, feature_columns: Any, embedding_dict: Any, support_dense: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """deepctr-torch's own, with one lookup for all single-valued features in the collection."""
    from deepctr_torch.inputs import SparseFeat

    def collected(feature: Any) -> bool:
        if not isinstance(feature, SparseFeat):
            return False
        table = embedding_dict[feature.embedding_name]
        return isinstance(table, CollectedTable)

    own = type(model).input_from_feature_columns
    together = [feature for feature in feature_columns if collected(feature)]
    if not together:
        result: tuple[list[Tensor], list[Tensor]] = own(
            model, X, feature_columns, embedding_dict, support_dense
        )
        return result
    rest = [feature for feature in feature_columns if not collected(feature)]
    others, dense = own(model, X, rest, embedding_dict, support_dense)
    columns = [model.feature_index[feature.name][0] for feature in together]
    first = columns[0]
    adjacent = columns == list(range(first, first + len(columns)))
    ids = X[:, first : first + len(columns)] if adjacent else X[:, columns]
    home = embedding_dict[together[0].embedding_name].collection
    out = home.lookup([feature.embedding_name for feature in together], ids.long())
    found = iter(out.split(1, 1))
    single = [f for f in feature_columns if isinstance(f, SparseFeat)]
    # Single-valued features that are not in the collection come first in `others`, in order.
    left = iter(others[: len(single) - len(together)])
    ordered = [next(found) if collected(feature) else next(left) for feature in single]
    return [*ordered, *others[len(single) - len(together) :]], dense
