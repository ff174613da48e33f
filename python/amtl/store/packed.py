"""Packed files: frozen layers, models with frozen layers, and whole runs, as safetensors.

The tiers are stored as they are, so loading is a memory map: nothing is unpacked, nothing is
pickled, and a table of any size opens in milliseconds. Files up to 64 MiB are checked then; of
larger ones each layer is when it is first called, saved, copied or asked for its state.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from amtl.errors import UserError, together
from amtl.layer.collection import AMTLEmbeddingCollection, CollectedTable
from amtl.layer.conversion import layers as layers_of
from amtl.layer.conversion import swap
from amtl.layer.convertible import require_model
from amtl.layer.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer.hosts import check
from amtl.layer.names import COMPILED, PARALLEL, unwrapped, wrapped_as
from amtl.layer.replicas import retire, wrappers_of
from amtl.layer.sharing import require_places
from amtl.layer.table import AMTLTable
from amtl.store.dense import pack, unpack
from amtl.store.files import write_aside
from amtl.store.tensors import FileTensors, PackedFileError, document_writer, read_document
from amtl_kernels._calls import kind as kind_of

FORMAT, VERSION = "amtl-packed", 4
_VERSION_OF_16_BITS, _VERSION_OF_RUNS = 2, 3
"""Version 2 added tables of numbers of 16 bits. Version 3 is of runs: what is known of them is
deflated, and their dense layers may be codes of 8 bits. Version 4 is of tables in a basis of their
own. Each is written where it is needed: older readers open all other files, and say of these that
they are newer."""
_RUN_OF_V1 = "amtl-model"
_ABOUT = "about"
"""The tensor that holds a run's metadata."""

_CLASSES: dict[str, type[AMTLTable]] = {
    "AMTLEmbedding": AMTLEmbedding,
    "AMTLEmbeddingBag": AMTLEmbeddingBag,
    "AMTLEmbeddingCollection": AMTLEmbeddingCollection,
}
_Model = TypeVar("_Model", bound=nn.Module)
_Kind = Literal["layer", "layers", "model", "run"]


@dataclass
class PackedFile:
    """An opened packed file.

    Attributes:
        kind: what was saved: one "layer", a dict of "layers", a "model", or a "run", which is a
            model with settings and vocabularies.
        layers: frozen layers by dotted name ("" for a single layer), parameters memory-mapped.
        aliases: further names of shared layers -> the name in `layers`.
        state: the model's other parameters and buffers by state_dict key.
        metadata: what the writer attached, JSON-able.
        tensors: tensors that the writer attached.
    """

    kind: _Kind
    layers: dict[str, AMTLTable]
    aliases: dict[str, str] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def into(self, model: _Model, *, assign: bool = False) -> _Model:
        """Put the layers into a model of the same architecture and load the rest of its state.

        What torch.compile, data parallelism and AveragedModel wrap goes by its own names, in the
        model and in the file. A DistributedDataParallel is to be made anew before it trains, as
        after `freeze`.

        Args:
            model: built as usual, with embeddings of any kind where the layers go.
            assign: the rest takes the place of the model's tensors instead of being copied into
                them, as in `load_state_dict`; so it does where these are on the meta device.
                Otherwise tables, too, go to the device and type of the embeddings there.

        Returns:
            The same model, its embeddings replaced.

        Raises:
            TypeError: no module.
            PackedFileError: the model has other modules, keys or shapes than the one saved,
                embeddings of another class, shape, pooling, padding row or norm, or one that is
                wrapped by itself; it is left as it was.
        """
        require_model(model)
        # Files of before have an AveragedModel as it is.
        inner = unwrapped(model) if "n_averaged" in self.state else _averaged(model)
        names = self._own_names(inner)
        targets = {names[name]: name for name in self.layers}
        targets |= {names[name]: source for name, source in self.aliases.items()}
        prefixes = tuple(f"{name}." for name in targets)
        state = {names[key]: value for key, value in self.state.items()}
        keys = {_own_name(inner, key): key for key in inner.state_dict()}
        rest = {
            name: value
            for name, value in zip(keys, inner.state_dict().values(), strict=True)
            if not name.startswith(prefixes)
        }
        # Of a wrapper and what it wraps, which have one name, the latter comes last.
        found = {
            _own_name(inner, place): (place, module)
            for place, module in inner.named_modules(remove_duplicate=False)
        }
        absent = [name for name in targets if name not in found]
        missing, surplus = sorted(rest.keys() - state), sorted(state.keys() - rest)
        shapes = [k for k in rest.keys() & state.keys() if rest[k].shape != state[k].shape]
        if absent or missing or surplus or shapes:
            apart = "; amtl.load(FILE) without a model has tables by themselves in .layers"
            raise PackedFileError(
                "the file does not fit the model: "
                f"modules not in the model: {absent}; keys not in the file: {missing}; "
                f"keys not in the model: {surplus}; other shapes: {sorted(shapes)}"
                f"{apart if absent else ''}"
            )
        require_alike((n, self.layers[source], found[n][1]) for n, source in targets.items())
        embeddings = [found[name][1] for name in targets]
        homes = {name: found[name][0].rpartition(".") for name in targets}
        for name, (parent, _, key) in homes.items():
            if wrapped_as(inner.get_submodule(parent)) == key:
                raise PackedFileError(
                    f"{name!r} of the model is wrapped by itself "
                    f"({kind_of(inner.get_submodule(parent))}): load first, then wrap it"
                )
        check(inner, embeddings)
        retire(wrappers_of(p for module in embeddings for p in module.parameters()))
        assign = assign or any(value.is_meta for value in rest.values())
        places: dict[nn.Module, list[str]] = {}
        layers: dict[nn.Module, AMTLTable] = {}
        for name, source in targets.items():
            place, old = found[name]
            places.setdefault(old, []).append(place)
            layers[old] = self.layers[source] if assign else _alike(self.layers[source], old)
        swap(inner, places, layers)
        for layer in layers.values():
            if layer in _unchecked:
                _unchecked[layer].attach(layer)
        inner.load_state_dict(
            {keys[name]: value for name, value in state.items()}, strict=False, assign=assign
        )
        return model

    def _own_names(self, model: nn.Module) -> dict[str, str]:
        """Names of modules and keys of the file -> the same in a model that is not wrapped."""
        names = {
            name: ".".join(part for part in name.split(".") if part != COMPILED)
            for name in (*self.layers, *self.aliases, *self.state)
        }
        whole = all(name.startswith(f"{PARALLEL}.") for name in names.values())
        if whole and PARALLEL not in model._modules:
            names = {name: own.removeprefix(f"{PARALLEL}.") for name, own in names.items()}
        return names


def _own_name(model: nn.Module, name: str) -> str:
    """The name of a module or state_dict key of a model, were nothing in the model wrapped."""
    own, module = [], model
    for part in name.split("."):
        if wrapped_as(module) != part:
            own.append(part)
        # Beyond modules comes the name of a tensor.
        inside = module._modules.get(part)
        module = _NOTHING if inside is None else inside
    return ".".join(own)


_NOTHING = nn.Module()


def _averaged(model: nn.Module) -> nn.Module:
    """What `unwrapped` gives, within torch.optim.swa_utils.AveragedModel, too."""
    model = unwrapped(model)
    return unwrapped(model.module) if isinstance(model, AveragedModel) else model


def _alike(layer: AMTLTable, module: nn.Module) -> AMTLTable:
    """A layer of a file, on the device and of the type of the embedding whose place it takes."""
    numbers = module.weight if isinstance(module, nn.Embedding | nn.EmbeddingBag) else module
    if not isinstance(numbers, Tensor | AMTLTable):
        return layer
    device, dtype = numbers.device, numbers.dtype
    if device.type != "meta" and (device, dtype) != (layer.device, layer.dtype):
        if layer in _unchecked:
            _unchecked[layer].check()
        layer.to(device, dtype)
    return layer


def require_alike(pairs: Iterable[tuple[str, nn.Module, nn.Module]]) -> None:
    """Raise unless layers of a file look up as the embeddings do whose places they are to take.

    Args:
        pairs: name, layer of the file, and embedding of the model: of torch.nn, or a layer. Any
            other module in its place tells nothing, and will do.

    Raises:
        PackedFileError: they do not.
    """
    unlike: list[tuple[str, Any, Any]] = []
    for name, layer, module in pairs:
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag | AMTLTable):
            continue
        if not isinstance(module, (type(layer), _COUNTERPARTS.get(type(layer), type(layer)))):
            unlike.append((f"{name!r} is", kind_of(layer), kind_of(module)))
            continue
        mine, theirs = _traits(layer), _traits(module)
        unlike += [
            (f"{name!r} has {trait}", mine[trait][0], theirs[trait][0])
            for trait in mine
            if trait in theirs and not any(value in theirs[trait] for value in mine[trait])
        ]
    if unlike:
        found = "; ".join(f"{what} {a} in the file, {b} in the model" for what, a, b in unlike)
        raise PackedFileError(
            f"the file does not fit the model: {found}. Build the model as the one that was saved"
        )


_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    AMTLEmbedding: nn.Embedding,
    AMTLEmbeddingBag: nn.EmbeddingBag,
    CollectedTable: nn.Embedding,
}


def _traits(table: Any) -> dict[str, list[Any]]:
    """What lookups depend on beside values; after `absorb_order()` as before it, too."""
    before = [getattr(table, "full_rows", table.num_embeddings), table.embedding_dim]
    traits = {
        "shape": [[table.num_embeddings, table.embedding_dim], before],
        "padding_idx": [table.padding_idx, getattr(table, "full_padding", table.padding_idx)],
    }
    norm = getattr(table, "max_norm", None)
    traits["max_norm"] = [norm]
    if norm is not None:
        traits["norm_type"] = [table.norm_type]
    for trait in ("mode", "include_last_offset", "names", "other_paddings"):
        if hasattr(table, trait):
            traits[trait] = [getattr(table, trait)]
    if hasattr(table, "names"):
        traits["field_sizes"] = [table.field_sizes]
    return traits


def save(
    obj: AMTLTable | Mapping[str, AMTLTable] | nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Any = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a frozen layer, several, or a model that holds frozen layers, to one file.

    The file is written aside, flushed and renamed: an interruption leaves the old file whole. The
    size search (head, counts) is not stored. A packed table can train on as it is, but for one of
    few bits, whose codes stay still until `thaw(counts=...)` makes numbers of them, which train.

    Args:
        obj: a frozen layer; frozen layers by name; or a model, of which everything in its
            state_dict is stored, under the names within torch.compile, DistributedDataParallel,
            DataParallel and AveragedModel.
        path: where to, for example "model.safetensors".
        metadata: anything JSON-able to store along: vocabularies, settings.
        tensors: further tensors to store along.

    Warns:
        UserWarning: a table whose ids are in no order of counts stores much beside its rows.

    Raises:
        TypeError: what is to be saved is none of these.
        ValueError: a layer is still searching, no layer at all, or something that cannot be
            stored.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON-able: {error}") from error
    kind: _Kind
    layers: dict[str, AMTLTable]
    model = None
    if isinstance(obj, nn.Module):
        obj = _averaged(obj)
    if isinstance(obj, AMTLTable):
        kind, layers = "layer", {"": obj}
    elif isinstance(obj, nn.Module):
        kind, layers, model = "model", layers_of(obj), obj
    elif isinstance(obj, Mapping):
        kind, layers = "layers", dict(obj)
    else:
        raise TypeError(
            f"save(model, path) takes a model, a layer or layers by name first, got {kind_of(obj)}"
        )
    write_packed(path, kind, layers, model, metadata=metadata, tensors=tensors)
    _tell_of_orders(layers)


def _tell_of_orders(layers: Mapping[str, AMTLTable]) -> None:
    """Warn of tables that take much more than was asked for, because of the order of their ids."""
    names, orders, rows = [], 0, 0
    for name, layer in layers.items():
        order, values = layer.told_order(), layer.value_bytes()
        if order is not None and not layer._keeps_numbering and 8 * order.nbytes > values:
            names.append(name)
            orders, rows = orders + order.nbytes, rows + values
    if names:
        warnings.warn(
            f"{together(names)}: {orders:,} bytes that say where rows lie are stored beside the "
            f"{rows:,} of the rows, for ids are in no order of counts: ids that are need none, and "
            "ids = layer.absorb_order() before saving gives such (old -> new)",
            stacklevel=3,
        )


def _require_whole(layers: Mapping[str, AMTLTable]) -> None:
    """Refuse tables of which a process holds a part, as FSDP leaves them."""
    tables = {
        name: layer.table_parameters()
        for name, layer in layers.items()
        if isinstance(layer, AMTLTable)
    }
    if parts := [name for name, held in tables.items() if any(p.dim() != 2 for p in held)]:
        raise ValueError(
            f"{together(parts)}: only a shard is here, as under FSDP. Save where it is whole, in "
            "`with FullyShardedDataParallel.summon_full_params(model):`"
        )
    # What FSDP2 leaves of a matrix is one.
    if parts := [n for n, held in tables.items() if any(hasattr(p, "placements") for p in held)]:
        raise ValueError(
            f"{together(parts)}: only a shard is here, as under FSDP2. Of all processes "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict gives the first one a whole state: load that "
            "into a model that was converted and frozen alike, and save this"
        )


def write_packed(
    path: str | os.PathLike[str],
    kind: _Kind,
    layers: Mapping[str, AMTLTable],
    model: nn.Module | None = None,
    *,
    metadata: Any = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """What `save` does, for its kinds and for runs.

    Args:
        path: where to.
        kind: see `PackedFile`.
        layers: frozen layers by name.
        model: what holds them, if anything does.
        metadata: JSON-able.
        tensors: to store along.

    Raises:
        As `save`.
    """
    if not layers:
        raise ValueError("there is no AMTL layer to save")
    _require_whole(layers)
    rest: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    if model is not None:
        layers = {_own_name(model, name): layer for name, layer in layers.items()}
        aliases = {
            own: next(n for n, layer in layers.items() if layer is module)
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, AMTLTable) and (own := _own_name(model, name)) not in layers
        }
        inside = tuple(f"{name}." for name in (*layers, *aliases))
        state = {_own_name(model, key): value for key, value in model.state_dict().items()}
        rest = {key: value for key, value in state.items() if not key.startswith(inside)}
    packed: dict[str, Tensor] = {}
    stored, version = dict(layers), 1
    for name, layer in layers.items():
        if not isinstance(layer, AMTLTable):
            raise ValueError(f"{name!r} is {kind_of(layer)}, not an AMTL layer")
        if type(layer).__name__ not in _CLASSES:
            raise ValueError(f"{name!r} is of a class of your own, {type(layer).__name__}")
        if layer.phase != "frozen":
            raise ValueError(f"layer {name!r} is still searching its sizes: call freeze() first")
        if layer in _unchecked:
            _unchecked[layer].check()
        if layer.rounding is not None and layer.steps is None:
            layer = stored[name] = layer.to_integers()
        for tier, block in enumerate(layer.blocks):
            packed[f"layers/{name}/blocks/{tier}"] = block.detach()
        order = layer.told_order()
        if order is not None:
            assert layer.tier_ends is not None
            require_places(order, layer.tier_ends[-1], name)
            packed[f"layers/{name}/row_order"] = order
        if layer.steps is not None:
            packed[f"layers/{name}/steps"] = layer.steps
        if layer.basis is not None:
            packed[f"layers/{name}/basis"] = layer.basis
            version = VERSION
        if layer.options.bits == 16:
            version = max(version, _VERSION_OF_16_BITS)
    for key, value in rest.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} of the state_dict is {kind_of(value)}, not a tensor")
        numbers, steps = pack(value.detach()) if kind == "run" else (value.detach(), None)
        packed[f"state/{key}"] = numbers
        if steps is not None:
            packed[f"steps/{key}"] = steps
    for key, value in (tensors or {}).items():
        packed[f"user/{key}"] = value.detach()
    if kind == "run":
        packed[_ABOUT], metadata = deflated(metadata), None
        version = max(version, _VERSION_OF_RUNS)
    header = {
        "kind": kind,
        "layers": {name: layer.config() for name, layer in stored.items()},
        "aliases": aliases,
        "metadata": metadata,
    }
    write_aside({Path(path): document_writer(FORMAT, version, packed, header)})


def open_packed(
    path: str | os.PathLike[str],
    *,
    verify: bool | None = None,
    device: torch.device | str | None = None,
) -> PackedFile:
    """Open a packed file with everything in it; tensors are memory-mapped.

    Args:
        path: a file of `save` or `amtl pack`.
        verify: compare the checksums of all tensors now (True, reads them) or never (False). None:
            now for files up to 64 MiB; of larger ones, those of `state` and `tensors` when a
            tensor is taken out, a layer's when it is first called, saved, copied, reverted or asked
            for rows, numbers or parameters by one of its methods. Who reaches for its `blocks` past
            these should open the file with True.
        device: move everything there, which reads it, so it is checked unless `verify` is False.

    Raises:
        PackedFileError: not a packed file, of a newer version, or inconsistent.
        TensorFileError: truncated or corrupted (PackedFileError is one, too).
        FileNotFoundError: no such file.
        ImportError: safetensors is not installed.
    """
    contents, kind, _, header = read_document(Path(path), {FORMAT: VERSION, _RUN_OF_V1: 1}, verify)
    if device is not None:
        contents = contents.to(device)
    try:
        if kind == _RUN_OF_V1:
            return _run_of_v1(contents, header)
        about = header["metadata"]
        if _ABOUT in contents:
            about = json.loads(zlib.decompress(contents[_ABOUT].cpu().numpy().tobytes()))
        return PackedFile(
            kind=header["kind"],
            layers={
                name: _layer(name, config, contents.select(f"layers/{name}/"))
                for name, config in header["layers"].items()
            },
            aliases=header["aliases"],
            state=_state(contents),
            metadata=about,
            tensors=contents.select("user/"),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise PackedFileError(f"{path} is inconsistent: {error!r}") from error


def deflated(content: Any) -> Tensor:
    """JSON as a tensor of bytes: in the header each of its quotes would be escaped twice."""
    return torch.frombuffer(
        bytearray(zlib.compress(json.dumps(content).encode(), 9)), dtype=torch.uint8
    )


def _state(contents: FileTensors) -> Mapping[str, Tensor]:
    """What a file holds beside its layers, codes as the numbers that they stand for."""
    state, steps = contents.select("state/"), contents.select("steps/")
    if not steps:
        return state
    return {
        name: unpack(value, steps[name]) if name in steps else value
        for name, value in state.items()
    }


def table_of_tiers(blocks: Sequence[Tensor], dim: int, bags: bool) -> AMTLTable:
    """A frozen layer around tiers, or around one dense table; averages bags if there are any.

    Args:
        blocks: tier `c` as `[rows, width_c]`, used as they are.
        dim: width of the output.
        bags: whether it is called with offsets.
    """
    like: AMTLTable
    if bags:
        like = AMTLEmbeddingBag(1, dim, counts=torch.ones(1), budget=1.0, sparse=True, mode="mean")
    else:
        like = AMTLEmbedding(1, dim, counts=torch.ones(1), budget=1.0, sparse=True)
    ends = list(itertools.accumulate(block.shape[0] for block in blocks))
    rows = {"num_embeddings": ends[-1], "full_rows": ends[-1], "field_sizes": ends[-1:]}
    shape = {**rows, "tier_ends": ends}
    return type(like).from_config({**like.config(), **shape}, blocks)


def _run_of_v1(contents: FileTensors, meta: Mapping[str, Any]) -> PackedFile:
    """What version 1 of `amtl pack` wrote, as its successor would have it."""
    tiers = contents.select("table.")
    blocks = [tiers.unchecked(str(c)) for c in range(meta["tiers"])]
    table = table_of_tiers(blocks, meta["config"]["dim"], meta["bags"])
    _check_when_used(table, tiers)
    return PackedFile(
        kind="run",
        layers={"table": table},
        state=contents.select("mlp.", "mlp."),
        metadata={**{k: meta[k] for k in ("config", "encoder", "metrics")}, "codes": {}},
        tensors=contents.select("encoder."),
    )


def _layer(name: str, config: Mapping[str, Any], contents: FileTensors) -> AMTLTable:
    blocks = [contents.unchecked(f"blocks/{c}") for c in range(len(config["tier_ends"]))]
    beside = (
        contents.unchecked(key) if key in contents else None
        for key in ("row_order", "steps", "basis")
    )
    layer = _CLASSES[config["class"]].from_config(config, blocks, *beside)
    layer.name = name
    _check_when_used(layer, contents)
    return layer


class _Unchecked:
    """What checks a layer's part of a file before its values are first used: hooks, and its word.

    Hooks come before anything that a call does, the layer's own word where no call is.
    """

    def __init__(self, contents: FileTensors | None = None) -> None:
        self._contents = contents
        self._handles: list[Any] = []

    def __call__(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            _check_while_tracing(id(self))
            return
        self.check()
        # Not above: a graph that is being traced counts the hooks.
        for handle in self._handles:
            handle.remove()

    def attach(self, layer: AMTLTable) -> None:
        layer._before_use = self
        self._handles = [
            layer.register_forward_pre_hook(self, prepend=True),
            layer.register_state_dict_pre_hook(self),
        ]

    def check(self) -> None:
        if self._contents is not None:
            self._contents.check()
        self._contents = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a layer hold checked values."""
        self.check()
        return (_Unchecked, ())


_unchecked: weakref.WeakKeyDictionary[AMTLTable, _Unchecked] = weakref.WeakKeyDictionary()


def _check_when_used(layer: AMTLTable, contents: FileTensors) -> None:
    if not contents.checked:
        _unchecked[layer] = _Unchecked(contents)
        _unchecked[layer].attach(layer)


def _check_while_tracing(number: int) -> bool:
    """The compiler runs this instead of tracing it."""
    for hook in list(_unchecked.values()):
        if id(hook) == number:
            hook.check()
    return True


# What torch.compiler.assume_constant_result() sets, which would import the compiler.
_check_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
