"""One collection in the place of tables that a model of a library looks up one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from amtl.layer.collection import AMTLEmbeddingCollection, CollectedTable, check_alike
from amtl.layer.conversion import places_of, swap
from amtl.layer.convertible import check_unshared
from amtl.layer.shares import automatic_bits, common_bits
from amtl.layer.table import AMTLTable
from amtl.store.packed import PackedFile, require_alike

COLLECTION = "amtl_collection"
"""The attribute of an owner that holds its collection."""


class Owner(NamedTuple):
    """What looks tables up, and how it does with a collection.

    Attributes:
        module: of the model, or the model itself.
        tables: its embeddings by name, some of them under several.
        method: the name of the method that looks them up.
        own: this method in the library; a class that has another one keeps that.
        joined: called with the module and the method's arguments in its place.
    """

    module: nn.Module
    tables: nn.ModuleDict
    method: str
    own: Callable[..., Any]
    joined: Callable[..., Any]


def fit(owner: Owner, tables: Mapping[str, nn.Module], options: Mapping[str, Any]) -> bool:
    """Whether these tables of the owner are several that go into one collection."""
    shared = options.get("shared_rows")
    if isinstance(shared, Mapping) and shared.keys() != tables.keys():
        return False
    try:
        _check(owner, tables)
    except ValueError:
        return False
    return len(tables) > 1 and "field_sizes" not in options


def collect(
    model: nn.Module,
    owner: Owner,
    tables: Mapping[str, Any],
    counts: Mapping[str, Any],
    budget: float | None,
    optimizer: Optimizer | None,
    options: Mapping[str, Any],
) -> AMTLEmbeddingCollection:
    """Put tables into one collection of their owner, and the optimizer's state along.

    Args:
        model: the whole of it.
        owner: of the tables.
        tables: embeddings by name.
        counts: training counts by name.
        budget: of the collection.
        optimizer: the model's; None: those found in the process.
        options: of the collection; bits as in `amtl.convert`.

    Raises:
        ValueError: tables that do not go into one collection. Nothing is replaced then.
    """
    _check(owner, tables)
    check_unshared(model, {table: name for name, table in tables.items()})
    given = {} if optimizer is None else {"optimizer": optimizer}
    bits = common_bits(automatic_bits(budget, [t.weight for t in tables.values()], options))
    made = AMTLEmbeddingCollection.from_embeddings(
        tables, counts, **{**given, "budget": budget, **options, "bits": bits}
    )
    _install(model, owner, made)
    return made


def load(
    packed: PackedFile, model: nn.Module, owner_at: Callable[[str], Owner | None]
) -> dict[nn.Parameter, AMTLTable]:
    """Put a packed file into a newly built model, whose tables may be in collections of the file.

    Args:
        packed: the file.
        model: without layers; left as it was if the file does not fit.
        owner_at: the owner of this dotted name, None if there is none.

    Returns:
        What is looked up now, by the weight of the embedding that was.

    Raises:
        PackedFileError: the file does not fit the model.
    """
    before: dict[str, Any] = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    installed: list[tuple[Owner, dict[nn.Module, nn.Module]]] = []
    try:
        for name, layer in packed.layers.items():
            place, _, attribute = name.rpartition(".")
            if isinstance(layer, AMTLEmbeddingCollection) and attribute == COLLECTION:
                owner = owner_at(place)
                if owner is not None and all(table in owner.tables for table in layer.names):
                    prefix = f"{place}." if place else ""
                    require_alike(
                        (f"{prefix}{table}", layer.table(table), owner.tables[table])
                        for table in layer.names
                    )
                    installed.append((owner, _install(model, owner, layer)))
        packed.into(model)
    except Exception:
        for owner, replaced in installed:
            _uninstall(model, owner, replaced)
        raise
    layers: dict[nn.Parameter, AMTLTable] = {}
    for name, weight in before.items():
        found = model.get_submodule(name)
        if isinstance(found, CollectedTable):
            layers[weight] = found.collection
        elif isinstance(found, AMTLTable):
            layers[weight] = found
    return layers


def _check(owner: Owner, tables: Mapping[str, nn.Module]) -> None:
    if hasattr(owner.module, COLLECTION):
        raise ValueError(
            f"the model has a collection already, {COLLECTION}; collection=False makes layers of "
            "further tables"
        )
    check_alike(tables)


def _install(
    model: nn.Module, owner: Owner, collection: AMTLEmbeddingCollection
) -> dict[nn.Module, nn.Module]:
    """Look tables up in a collection, wherever they are; returns what took the place of each."""
    replaced: dict[nn.Module, nn.Module] = {
        owner.tables[name]: collection.table(name) for name in collection.names
    }
    place = next(name for name, module in model.named_modules() if module is owner.module)
    collection.name = f"{place}.{COLLECTION}".removeprefix(".")
    setattr(owner.module, COLLECTION, collection)
    if getattr(type(owner.module), owner.method, None) is owner.own:
        vars(owner.module)[owner.method] = functools.partial(owner.joined, owner.module)
    swap(model, places_of(model), replaced)
    return replaced


def _uninstall(model: nn.Module, owner: Owner, replaced: Mapping[nn.Module, nn.Module]) -> None:
    delattr(owner.module, COLLECTION)
    vars(owner.module).pop(owner.method, None)
    swap(model, places_of(model), {new: old for old, new in replaced.items()})
