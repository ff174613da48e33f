"""Put AMTL layers into an existing model, and take them out again."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amtl.errors import together
from amtl.layer.basis import BITS, PRINCIPAL, bears_basis, pay_for_bases
from amtl.layer.budget import check_share
from amtl.layer.bypass import end_calls, end_first_passes, watch_calls, watch_first_passes
from amtl.layer.companions import accompany
from amtl.layer.convertible import (
    check_convertible,
    check_unshared,
    embedding_from,
    embeddings_of,
    find_module,
    is_embedding,
    require_model,
)
from amtl.layer.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer.frequency import check_counts, check_field_sizes
from amtl.layer.fusing import FusedOptimizer, make_handle
from amtl.layer.growing import Growth
from amtl.layer.hosts import check, settle
from amtl.layer.instances import looked_for_once
from amtl.layer.names import name_sizes
from amtl.layer.options import SearchOptions
from amtl.layer.replicas import retire, wrappers_of
from amtl.layer.rewiring import rewire
from amtl.layer.shares import (
    AUTO,
    Demand,
    automatic_bits,
    common_bits,
    nothing_gathered,
    split_budget,
    tell_of_nothing_in,
)
from amtl.layer.table import AMTLTable
from amtl.layer.tiers import Weakly
from amtl_kernels._calls import kind
from amtl_kernels.optim import RowOptimizer

_Model = TypeVar("_Model", bound=nn.Module)

_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


def layers(model: nn.Module) -> dict[str, AMTLTable]:
    """The AMTL layers of a model by dotted name; a shared one under its first name.

    Raises:
        TypeError: no module.
    """
    require_model(model)
    return {name: m for name, m in model.named_modules() if isinstance(m, AMTLTable)}


def mask_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What learns the sizes, over all layers: for a parameter group with its own learning rate."""
    found = layers(model).values()
    accompany(layer.head for layer in found if layer.head is not None)
    return [p for layer in found for p in layer.mask_parameters()]


def table_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The tables, over all layers."""
    return [p for layer in layers(model).values() for p in layer.table_parameters()]


def parameter_groups(model: nn.Module, **mask_options: Any) -> list[dict[str, Any]]:
    """All parameters in two groups for an optimizer: the model's, then what learns the sizes.

    Tables that have a fused optimizer are left to it.

    Args:
        model: a model with AMTL layers.
        **mask_options: options of the second group, such as `lr=1e-2`.
    """
    masks = mask_parameters(model)
    known = {id(p) for p in masks}
    for layer in layers(model).values():
        if layer.fused_optimizer is not None:
            known.update(id(p) for p in layer.table_parameters())
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": rest}, {"params": masks, **mask_options}]


def fuse(model: _Model, optimizer: FusedOptimizer | None) -> _Model:
    """`layer.fuse(optimizer)` on all layers, with one optimizer for all of them.

    Args:
        model: a model with AMTL layers.
        optimizer: as for a layer: a class of `amtl_kernels.optim`, a `functools.partial` of one, or
            an optimizer that holds all the tables already; None: gradients again.

    Returns:
        The model; `fused_optimizers(model)` are the handles.

    Raises:
        TypeError: another kind of optimizer.
        ValueError: an optimizer that does not hold all the tables, or no layer at all.
    """
    found = layers(model)
    if not found:
        raise ValueError("the model has no AMTL layers to fuse an optimizer with")
    handle = None if optimizer is None else make_handle(optimizer, table_parameters(model))
    before = {layer: layer.fused_optimizer for layer in found.values()}
    try:
        for layer in before:
            layer.fuse(handle)
    except ValueError:
        for layer, former in before.items():
            layer.fused_optimizer = former
        raise
    return model


def fused_optimizers(model: nn.Module) -> list[RowOptimizer]:
    """The optimizers that update tables of a model within the backward, each once.

    For learning-rate schedulers, checkpoints and `step()`.
    """
    handles = (layer.fused_optimizer for layer in layers(model).values())
    return list(dict.fromkeys(handle for handle in handles if handle is not None))


def update_schedule(model: nn.Module, progress: float) -> None:
    """Tell all layers how far training is, which sets temperature and size noise where sizes learn.

    Args:
        model: a model with AMTL layers.
        progress: share of training that is done, in 0..1.

    Raises:
        ValueError: progress is outside 0..1.
    """
    for layer in layers(model).values():
        layer.update_schedule(progress)


def freeze(
    model: _Model,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    bits: int | None = None,
    masters: bool | None = None,
) -> _Model:
    """`layer.freeze(optimizer, bits=bits, masters=masters)` on all layers that are still searching.

    Where a module keeps a table in a list of its own, as regularisers do, its tiers take its place.

    Under DistributedDataParallel, freeze in all processes at the same step, then wrap anew, for the
    parameters are others:

        amtl.freeze(model.module, optimizer)
        model = DistributedDataParallel(model.module)

    That sizes are the same in all processes is checked; the old wrapper refuses to train.
    `thaw()`, and loading a state of the other phase, ask for the same.

    Args:
        model: a model with AMTL layers.
        optimizer: what holds the tables, whose state then follows; None: whichever do, looked for
            among all objects of the process.
        bits: of a stored number, 2, 4, 8 or 16, in place of each layer's own.
        masters: False keeps codes only, in place of each layer's own.

    Returns:
        The model. O(N * D) a table, and O(objects in the process) where the optimizers are looked
        for.

    Raises:
        RuntimeError: processes have different sizes.
        ValueError: a table is trainable but not in the optimizer, or a layer cannot do what is
            asked of it, see `AMTLEmbedding.freeze`.
    """
    optimizers = list(optimizer) if isinstance(optimizer, Iterable) else optimizer
    found = layers(model)
    if not found:
        warnings.warn(
            "the model has no AMTL layers to freeze. amtl.convert of a whole model puts them in; "
            "of a single nn.Embedding it returns the layer: model.item = amtl.convert(model.item, "
            "counts)",
            stacklevel=2,
        )
    with looked_for_once():
        for layer in found.values():
            if layer.phase == "search":
                _freeze(model, layer, optimizers, bits=bits, masters=masters)
    return model


def _freeze(model: nn.Module, layer: AMTLTable, optimizers: Any, **given: Any) -> None:
    table = layer.weight
    layer.freeze(optimizers, **given)
    rewire(model, {id(table): layer.table_parameters()})


def _thaw(model: nn.Module, layer: AMTLTable, optimizers: Any, counts: object) -> None:
    first, *others = map(id, layer.table_parameters())
    layer.thaw(optimizers, counts=counts)
    rewire(model, {first: layer.table_parameters(), **dict.fromkeys(others, ())})


def thaw(
    model: _Model,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    counts: Mapping[str, Any] | None = None,
) -> _Model:
    """`layer.thaw(optimizer, counts=...)` on all layers that are frozen: the inverse of `freeze`.

    Args:
        model: a model with AMTL layers.
        optimizer: as in `freeze`.
        counts: by any name of a layer, for those that were loaded from a packed file, and new ones
            for others, whose sizes follow from these.

    Returns:
        The model. O(N * D) a table.

    Raises:
        RuntimeError: a layer has no counts and none are given.
        ValueError: a table is trainable but not in the optimizer, or counts are given for a name
            that no layer has.
    """
    optimizers = list(optimizer) if isinstance(optimizer, Iterable) else optimizer
    counts_of = _by_layer(model, counts or {})
    with looked_for_once():
        for layer in layers(model).values():
            if layer.phase == "frozen":
                _thaw(model, layer, optimizers, counts_of.get(layer))
    return model


def grow(
    model: _Model,
    counts: Mapping[str, Any],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> _Model:
    """New counts for frozen tables, and rows for ids that are new: they go on training.

    What a model needs that is trained day after day. Sizes follow the new counts; rows of before
    keep their numbers and what optimizers know of them, and step sizes are those that they had, or
    the mean of these where rows are rounded together now. There are as many new rows as counts go
    beyond the table; they begin as the mean of the others of their field, without state. Tables
    that are not named stay as they are.

    Args:
        model: a model with frozen AMTL layers, also of a file that `amtl.load` opened.
        counts: by name of a layer: [N] or more, of the rows that the table should know, see
            `amtl.convert`; old counts plus new ones, say. Of several fields those of each, see
            `AMTLEmbedding.thaw`: `{"tables": {"item": item_counts, "user": user_counts}}` of a
            collection.
        optimizer: as in `freeze`.

    Returns:
        The model. O(N * D) a table.

    Raises:
        RuntimeError: a layer that is named is not frozen.
        ValueError: a table is trainable but not in the optimizer; counts are given for a name that
            no layer has, are fewer than rows, or more where a table holds several fields and they
            are not those of each.
    """
    optimizers = list(optimizer) if isinstance(optimizer, Iterable) else optimizer
    counts_of = _by_layer(model, counts)
    for layer in counts_of:
        if layer.phase != "frozen":
            raise RuntimeError(f"{layer.name!r} is still searching its sizes: amtl.freeze first")
    with looked_for_once():
        for layer, new in counts_of.items():
            squares, fields = layer.row_squares(), layer.field_sizes
            _thaw(model, layer, optimizers, new)
            _freeze(model, layer, optimizers)
            if squares is not None:
                layer.round_by(Growth.between(fields, layer.field_sizes).spread(squares))
    return model


def _by_layer(model: nn.Module, counts: Mapping[str, Any]) -> dict[AMTLTable, Any]:
    """Counts that are given by any name of a layer.

    Raises:
        ValueError: no layer has that name.
    """
    found, places = layers(model), places_of(model)
    unknown = counts.keys() - {name for layer in found.values() for name in places[layer]}
    if unknown:
        raise ValueError(
            f"counts are given for {min(unknown)!r}, which is no layer; those are {list(found)}"
        )
    return {
        layer: counts[name]
        for layer in found.values()
        for name in places[layer][::-1]
        if name in counts
    }


def convert(
    model: _Model,
    counts: Mapping[str, Any] | Tensor,
    budget: float | Mapping[str, float | None] | None = 0.4,
    names: Iterable[str] | None = None,
    fused_optimizer: FusedOptimizer | None = None,
    bits: int | str | None = AUTO,
    basis: str | None = None,
    **options: Any,
) -> _Model:
    """Replace embeddings of a trained or untrained model by AMTL layers, in place.

    A warm start: the layer takes over the very weight Parameter, so optimizers that hold it stay
    valid, and its type, device, `requires_grad`, `padding_idx`, `max_norm`, `sparse`, training
    flag, hooks and attributes that were set on it. New to the optimizer are the mask parameters:
    `optimizer.add_param_group({"params": amtl.mask_parameters(model), "lr": 1e-2})`.
    A module that appears under several names is replaced everywhere by one layer, also where the
    model keeps it in a plain list, dict, tuple or set, or an object in these holds it. A model that
    uses the weight itself, as by `h @ model.table.weight.T`, would go past the masks before it is
    frozen: its first forward pass is then an error that says so. A loss or a variable that holds an
    embedding of before goes on calling that, which it warns of: make such things afterwards.

    Rows may be in any order: groups are looked up by row, so the caller permutes nothing. A table
    in frequency order is faster (hot rows are neighbours), and always freezes without the 4 bytes a
    row of `row_order`; others do where all rows keep all numbers, as at the usual budgets.

    Args:
        model: any module; nn.Embedding and nn.EmbeddingBag in it are candidates. If it is itself
            an embedding, use the layer returned.
        counts: training counts [N] by dotted module name (any name of a shared module, and of all
            its lookups); for a model that is itself an embedding, the counts alone will do.
            `torch.bincount(indices.flatten(), minlength=N)` over the training split. A mapping of
            row numbers to counts, or a Series of pandas with such an index, will do for them.
        budget: stored fraction of all these tables together, see `amtl.SearchOptions`: it goes
            where counts say, so that small tables that are used all the time stay whole. A mapping
            by name gives each table a budget of its own.
        names: what to replace; None: everything named in `counts`.
        fused_optimizer: one for all the tables, as in `amtl.fuse`: the backward applies it, and
            other optimizers that hold the tables never see a gradient of theirs.
        bits: of a stored number, in tables whose rows are wide enough to gain by it. "auto": 8 or
            4, what loses least at this budget, see `amtl.layer.shares`; once frozen, training
            rounds what is looked up and goes on in numbers of the table's type, which `amtl.save`
            leaves out. None: numbers of the table's type and narrower rows, so that training takes
            less memory, too.
        basis: "principal" of a trained model whose rows are to be cut off: each table is held in
            its principal components, see `AMTLEmbedding.to_principal_basis`, of which few numbers
            are most of it, in 8 bits unless `bits` says otherwise. The budget pays for the [D, D]
            numbers of a basis; tables of which they would be more than a quarter stay as they are,
            and so do those that keep every number.
        **options: other options of the layers, see `amtl.SearchOptions`; `field_sizes`, and
            `shared_rows`, which may also be a mapping by name.

    Returns:
        The model (the new layer if the model was itself an embedding).

    Raises:
        TypeError: no module, a fused optimizer of another kind, counts without names.
        ValueError: an unknown name or none, missing counts, a budget beyond (0, 1], a module or a
            weight that cannot be replaced, a fused optimizer without one of the tables (see the
            message). Nothing is replaced then.
    """
    require_model(model)
    if isinstance(names, str):
        raise TypeError(f"names must be several, such as [{names!r}], got the text {names!r}")
    if not isinstance(counts, Mapping) or not all(isinstance(name, str) for name in counts):
        if not isinstance(model, nn.Embedding | nn.EmbeddingBag):
            keys = counts if isinstance(counts, Mapping) else ()
            by = "".join(f" by {kind(key)}" for key in list(keys)[:1])
            raise TypeError(
                "counts must be a mapping, of the names of modules to counts of their rows, got "
                f"{kind(counts)}{by}; the names of the embeddings are {embeddings_of(model)}"
            )
        counts = {"": counts}
    _check_options(options)
    if basis not in (None, PRINCIPAL):
        raise ValueError(f"basis must be {PRINCIPAL!r} or None, got {basis!r}")
    places = places_of(model)
    wanted = list(dict.fromkeys(counts if names is None else names))
    if not wanted:
        raise ValueError(
            f"{'counts' if names is None else 'names'} is empty, so there is nothing to convert: "
            'counts={"item": torch.bincount(train_items, minlength=num_items), ...} by the names '
            f"of embeddings; the model's are {embeddings_of(model)}"
        )
    by_module: dict[nn.Module, str] = {}
    for name in wanted:
        module = find_module(model, name)
        check_convertible(name, module)
        by_module.setdefault(module, name)
    check_unshared(model, by_module)
    check(model, by_module)
    found = {
        module: _checked_counts(module, (name, *places[module]), counts)
        for module, name in by_module.items()
    }
    chosen = _options_of(found, by_module, places, budget, {**options, "bits": bits}, basis)
    turned = pay_for_bases(chosen, _weight) if basis is not None else []
    if bits == AUTO and options.get("parametrization", "rule") == "rule":
        _tell_of_halves({by_module[module]: _weight(module) for module in found}, budget)
    replacements: dict[nn.Module, AMTLTable] = {}
    bare: dict[str, float] = {}
    for module, name in by_module.items():
        try:
            with nothing_gathered() as shares:
                replacements[module] = _layer_from(module, found[module], chosen[module])
        except ValueError as error:
            raise ValueError(f"table {name!r}: {error}") from error
        if shares:
            bare[name] = shares[0]
        replacements[module].name = name
        if replacements[module].mask_parameters():
            # What learns sizes is new to wrappers from before.
            retire(wrappers_of(module.parameters()))
    if fused_optimizer is not None and replacements:
        fuse(nn.ModuleList(replacements.values()), fused_optimizer)
    # All of them before any table is written to.
    of_layers = [(replacements[m], replacements[m]._components()) for m in turned]
    for layer, components in of_layers:
        layer._turn(*components)
    tell_of_nothing_in(bare, budget, alone=len(found) == 1)
    converted = swap(model, places, replacements)
    if not isinstance(converted, AMTLTable):
        watch_first_passes(converted)
    return converted


def revert(model: _Model, *, masked: bool = False) -> _Model:
    """Replace AMTL layers by nn.Embedding and nn.EmbeddingBag again, in place.

    Optimizers that hold the tables hold the weights from then on, with their state.

    Args:
        model: the model, or a layer itself (then use what is returned).
        masked: for layers in the search phase. False keeps the whole weight Parameter, so
            `revert(convert(model))` is the model as it was; True zeroes what the masks hide, so
            outputs stay those of the AMTL model. Frozen layers always keep their outputs.

    Returns:
        The model (the new embedding if the model was itself a layer). Rows keep the numbering that
        the layers expect.

    Raises:
        ValueError: a collection, whose tables `embeddings()` gives.
    """
    places = places_of(model)
    for name, layer in layers(model).items():
        if not isinstance(layer, AMTLEmbedding | AMTLEmbeddingBag):
            raise ValueError(
                f"{name!r} is {kind(layer)}, which no embedding can stand in for: its "
                "method embeddings() gives one for each table"
            )
    with looked_for_once():
        replacements = {
            module: embedding_from(module, masked)
            for module in places
            if isinstance(module, AMTLTable)
        }
    reverted = swap(model, places, replacements)
    end_first_passes(reverted)
    return reverted


def places_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All dotted names of every module; the root is ''."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    return places


def _rows(module: nn.Module) -> int:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return module.num_embeddings


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return module.weight


def _checked_counts(module: nn.Module, names: Sequence[str], counts: Mapping[str, Any]) -> Tensor:
    known = [name for name in dict.fromkeys(names) if name in counts]
    if not known:
        raise ValueError(
            f"counts for {names[0]!r} are missing: give "
            f"torch.bincount(training_indices.flatten(), minlength={_rows(module)})"
        )
    try:
        first, *others = (check_counts(counts[name], _rows(module)) for name in known)
    except ValueError as error:
        raise ValueError(f"{names[0] or type(module).__name__}: {error}") from error
    for name, other in zip(known[1:], others, strict=True):
        if not torch.equal(first.cpu(), other.cpu()):
            raise ValueError(
                f"{known[0]!r} and {name!r} are one table, and their counts differ: give their "
                "sum, under one of these names"
            )
    return first


def _options_of(
    counts: Mapping[nn.Module, Tensor],
    names: Mapping[nn.Module, str],
    places: Mapping[nn.Module, list[str]],
    budget: float | Mapping[str, float | None] | None,
    options: Mapping[str, Any],
    basis: str | None,
) -> dict[nn.Module, dict[str, Any]]:
    """What each layer is made with, its part of the budget included."""
    there = {name for found in places.values() for name in found}
    for what, by_name in (("a budget", budget), ("a shared row", options.get("shared_rows"))):
        for name in by_name if isinstance(by_name, Mapping) else ():
            if name not in there:
                raise ValueError(f"{what} is given for {name!r}, which the model does not have")
    chosen = {module: dict(options) for module in counts}
    if isinstance(options.get("shared_rows"), Mapping):
        shared = options["shared_rows"]
        for module, of_layer in chosen.items():
            named = (shared[n] for n in places[module] if n in shared)
            of_layer["shared_rows"] = next(named, None)
    if isinstance(budget, Mapping):
        for module, of_layer in chosen.items():
            found = next((n for n in places[module] if n in budget), None)
            if found is None:
                raise ValueError(f"a budget for {names[module]!r} is missing")
            _check_budget(budget[found])
            of_layer["budget"] = budget[found]
            if _in_components(module, budget[found], options, basis):
                of_layer["bits"] = BITS
        return chosen
    _check_budget(budget)
    if len(chosen) == 1:
        ((module, of_layer),) = chosen.items()
        of_layer["budget"] = budget
        if _in_components(module, budget, options, basis):
            of_layer["bits"] = BITS
        return chosen
    known = {field.name for field in fields(SearchOptions)}
    given = {key: value for key, value in options.items() if key in known}
    bits = automatic_bits(budget, [_weight(module) for module in counts], options)
    for each, module in enumerate(counts):
        if bits[each] and _in_components(module, budget, options, basis):
            bits[each] = BITS
    common = SearchOptions(budget=budget, **{**given, "bits": common_bits(bits)})
    demands = []
    for (module, of_rows), own_bits in zip(counts.items(), bits, strict=True):
        weight = _weight(module)
        sizes = check_field_sizes(options.get("field_sizes"), len(of_rows))
        demands.append(Demand(of_rows, weight.shape[1], weight.element_size(), sizes, own_bits))
    for of_layer, own in zip(chosen.values(), split_budget(demands, common), strict=True):
        of_layer.update(
            budget=own.budget, bits=own.bits, masters=own.masters, tier_width=own.tier_width
        )
    return chosen


def _in_components(
    module: nn.Module, budget: float | None, options: Mapping[str, Any], basis: str | None
) -> bool:
    """Whether the bits of a table are those of components, for nobody has chosen others."""
    alone = options["bits"] == AUTO and options.get("parametrization", "rule") == "rule"
    return None not in (basis, budget) and alone and bears_basis(_weight(module), budget)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises TypeError unless `convert` has all these options."""
    own = ("field_sizes", "row_features", "shared_rows")
    known = [*own, *(field.name for field in fields(SearchOptions)), "names", "fused_optimizer"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f": did you mean {near[0]!r}?" if near else "; amtl.SearchOptions lists them"
            raise TypeError(f"convert() has no option {name!r}{meant}")


def _tell_of_halves(
    weights: Mapping[str, Tensor], budget: float | Mapping[str, float | None] | None
) -> None:
    """Warns of tables that "auto" leaves in numbers of 16 bits, which it narrows."""
    halves = [name for name, weight in weights.items() if weight.dtype != torch.float32]
    least = min(
        (b for b in (budget.values() if isinstance(budget, Mapping) else [budget]) if b), default=1
    )
    if halves and least < 1:
        warnings.warn(
            f"{together(halves)}: rows of {weights[halves[0]].dtype} are narrowed to meet "
            "the budget, which a trained table does not bear: convert the model before it is cast "
            "to 16 bits, or take bits=8 (bits=None says that it is meant)",
            stacklevel=3,
        )


def _check_budget(budget: float | None) -> None:
    if budget is not None:
        check_share(budget)


def _layer_from(module: nn.Module, counts: Tensor, options: Mapping[str, Any]) -> AMTLTable:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    common: dict[str, Any] = {
        "padding_idx": module.padding_idx,
        "max_norm": module.max_norm,
        "norm_type": module.norm_type,
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "sparse": module.sparse,
        "_weight": module.weight.detach(),
        "counts": counts,
        **options,
    }
    layer: AMTLTable
    if isinstance(module, nn.Embedding):
        layer = AMTLEmbedding(module.num_embeddings, module.embedding_dim, **common)
    else:
        layer = AMTLEmbeddingBag(
            module.num_embeddings,
            module.embedding_dim,
            mode=module.mode,
            include_last_offset=module.include_last_offset,
            **common,
        )
    if not module.weight.is_contiguous():
        # The parameter itself stays: optimizers and lists of the model's own hold it.
        assert layer.weight is not None
        module.weight.data = layer.weight.data
    layer.weight = cast(nn.Parameter, module.weight)
    return layer


def swap(
    model: _Model,
    places: Mapping[nn.Module, list[str]],
    replacements: Mapping[Any, nn.Module],
) -> _Model:
    """Put the new modules where the old ones are, with what was put on these.

    That is their training flag, hooks, and attributes of the user's.
    """
    root: Any = model
    for old, new in replacements.items():
        new.train(old.training)
        former = end_calls(old)
        for hook in _HOOKS:
            # The very dictionaries: handles that were returned for removal stay valid.
            if hook in old.__dict__:
                new.__dict__[hook] = old.__dict__[hook]
        new.__dict__["_is_full_backward_hook"] = old.__dict__.get("_is_full_backward_hook")
        known = vars(new)
        extra = old.__dict__.get("_extra", ()) if isinstance(old, AMTLTable) else vars(old)
        extra = [key for key in extra if key not in known]
        known.update({key: vars(old)[key] for key in extra})
        if not is_embedding(new):
            new.__dict__["_former"] = Weakly(former)
            if is_embedding(former):
                watch_calls(former, new)
        if isinstance(new, AMTLTable):
            known["_extra"] = tuple(extra)
        for name in places[old]:
            if not name:
                root = new
                continue
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = new
    weights = _weights_that_go(replacements)
    gone = rewire(model, {**{id(old): [new] for old, new in replacements.items()}, **weights})
    if not gone.isdisjoint(weights) and layers(root):
        watch_first_passes(root)
    settle(root)
    name_sizes(root)
    accompany(layer.head for layer in layers(root).values() if layer.head is not None)
    result: _Model = root
    return result


def _weights_that_go(replacements: Mapping[Any, nn.Module]) -> dict[int, Sequence[Tensor]]:
    """What takes the place of the weights of modules that make way, by id."""
    found: dict[int, Sequence[Tensor]] = {}
    for old, new in replacements.items():
        before, after = _parameters_of(old), _parameters_of(new)
        if before and after and before[0] is not after[0]:
            found.update(dict.fromkeys(map(id, before), ()))
            found[id(before[0])] = after
    return found


def _parameters_of(module: nn.Module) -> Sequence[Tensor]:
    """The table of a layer or an embedding; none of what else may stand for one."""
    if isinstance(module, AMTLTable):
        return module._table()
    return [module.weight] if isinstance(module, nn.Embedding | nn.EmbeddingBag) else []
