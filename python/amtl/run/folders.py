"""Run folders: settings, vocabularies, checkpoints, the best model and its metrics.

`config.json`, `vocabulary.safetensors` (as fitted), `checkpoint.safetensors` (all that is needed to
go on), `best.safetensors` (the model with the best validation AUC) and, at the end,
`metrics.json`; until then `trained` has what was trained after the first model. Version 1 had
`checkpoint.pt` and `best.pt`, which are read still.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amtl.data.encoding import Encoder
from amtl.data.readers import is_table
from amtl.data.threads import require_threads
from amtl.errors import UserError
from amtl.layer.conversion import layers
from amtl.run import methods
from amtl.run.components import cut_off
from amtl.run.config import TrainConfig
from amtl.run.earlier import Earlier
from amtl.run.model import ClickModel, assemble, build_model
from amtl.run.trained import Trained
from amtl.store.dense import pack
from amtl.store.files import (
    RESTORE,
    cannot_write,
    json_text,
    read_json,
    write_aside,
    write_json,
)
from amtl.store.packed import PackedFile, deflated, open_packed, table_of_tiers, write_packed
from amtl.store.tensors import (
    FileTensors,
    PackedFileError,
    TensorFileError,
    compact,
    document_writer,
    expand,
    flatten,
    read_document,
    unflatten,
)

_ENTRY_BYTES = 160
_CONFIG, _VOCABULARY, _METRICS = "config.json", "vocabulary.safetensors", "metrics.json"
_TRAINED = "trained"
_CHECKPOINT = "amtl-checkpoint"
_ENDS = (".safetensors", ".pt")
_INCONSISTENT = (KeyError, TypeError, ValueError, AttributeError, IndexError, zlib.error)


def holds_run(folder: Path) -> bool:
    """Whether there is something to `--resume`, or to lose."""
    return any((folder / f"checkpoint{end}").exists() for end in _ENDS)


def is_begun(folder: Path) -> bool:
    """Whether a run has written its settings, which comes after its data were read."""
    return (folder / _CONFIG).exists()


def require_no_file(folder: Path) -> None:
    """Refuse a file, of `amtl pack` most likely, where a run is needed.

    Raises:
        UserError: it is one.
    """
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, and a run folder is needed here: the one that amtl train wrote "
            "and amtl pack read"
        )


def require_begun(folder: Path) -> None:
    """Refuse to go on with a run that is not there.

    Raises:
        UserError: nothing was begun in the folder.
    """
    require_no_file(folder)
    if not is_begun(folder):
        raise UserError(
            f"there is no run in {folder}: what was stopped while it read its data has saved "
            "nothing, and the same command without --resume begins it"
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from training into a run folder, which is made if need be.

    Two runs would write by turns, and the folder would end with settings of one and the model of
    the other. The system lets go of it when the process ends, however it does.

    Raises:
        UserError: another process has it.
        FileWriteError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training into {folder}: wait until it has ended, or choose "
                "another --out"
            ) from None
        except OSError:
            pass  # where the file system has no locks
        yield
    finally:
        os.close(handle)


def require_no_part(out: Path) -> None:
    """Refuse to write something else in the place of a run's own file.

    Raises:
        UserError: `out` is one.
    """
    own = {
        _CONFIG,
        _VOCABULARY,
        _METRICS,
        *(f"{n}{e}" for n in ("checkpoint", "best") for e in _ENDS),
    }
    if out.name in own and (out.parent / _CONFIG).exists():
        raise UserError(
            f"{out} is a part of the run {out.parent}, which needs it: choose another name"
        )


def begin_run(
    folder: Path,
    config: TrainConfig,
    encoder: Encoder,
    states: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write what a run starts from, in place of the run that the folder holds, if any.

    The old run goes when all that the new one needs is on disk, not before; what it has `trained`
    stays where states are given, which came out of that.

    Args:
        folder: the run.
        config: its settings.
        encoder: its vocabularies, as fitted.
        states: checkpoints of it that there are already, by name; see `save_checkpoint`.

    Raises:
        UserError: the folder cannot be written; the old run is whole.
    """
    old = [folder / f"{name}{end}" for name in ("checkpoint", "best") for end in _ENDS]
    old.append(folder / _METRICS)
    for path in old:
        if path.is_dir():
            raise UserError(
                f"cannot replace {path}: a folder is in the way; move it away or choose another "
                "--out (what was there before is unchanged)"
            )

    def remove() -> None:
        for path in old:
            path.unlink(missing_ok=True)
        if not states:
            clear_trainings(folder)

    text = json_text(config.to_dict())
    write_aside(
        {
            folder / _VOCABULARY: _encoder_writer(encoder),
            folder / _CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
            **{folder / f"{n}.safetensors": _writer(each) for n, each in (states or {}).items()},
        },
        remove,
    )


def load_inputs(folder: Path) -> tuple[TrainConfig, Encoder]:
    """Settings of a run, and its vocabularies as fitted.

    Raises:
        UserError: the folder is no run, or a file is damaged.
    """
    path = folder / _CONFIG
    content = read_json(path)
    try:
        config = TrainConfig.from_dict(content)
    except UserError:
        raise
    except _INCONSISTENT as error:
        raise UserError(f"{path} holds no settings of a run ({error}): {RESTORE}") from error
    path = folder / _VOCABULARY
    tensors, _, version, content = _read(path, {"amtl-encoder": 2})
    try:
        if version == 1:
            return config, Encoder.from_tensors(tensors, content)
        return config, _encoder(tensors, content)
    except _INCONSISTENT as error:
        raise UserError(f"{path} is inconsistent ({error!r}): {RESTORE}") from error


def save_checkpoint(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Save tensors, numbers, strings and containers of them; the old file stays whole till then.

    Args:
        folder: the run.
        name: "checkpoint" or "best".
        state: see `flatten`.

    Raises:
        FileWriteError: it cannot be written; the old one is whole.
        ValueError: something in `state` cannot be saved.
    """
    write_aside({folder / f"{name}.safetensors": _writer(state)})
    (folder / f"{name}.pt").unlink(missing_ok=True)


def _writer(state: Mapping[str, Any]) -> Callable[[Path], object]:
    tensors, tree = flatten(dict(state))
    return document_writer(_CHECKPOINT, 1, tensors, tree)


def load_checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, every byte of it checked.

    Raises:
        UserError: the file is missing, damaged, or of a newer format.
    """
    path = folder / f"{name}.safetensors"
    old = folder / f"{name}.pt"
    if not path.exists() and old.exists():
        return _load_checkpoint_of_v1(old)
    tensors, _, _, tree = _read(path, {_CHECKPOINT: 1})
    try:
        state: dict[str, Any] = unflatten(tensors, tree)
    except _INCONSISTENT as error:
        raise UserError(f"{path} is inconsistent ({error!r}): {RESTORE}") from error
    return state


def save_training(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Save what one training of a run that goes on has come to; see `save_checkpoint`."""
    save_checkpoint(folder / _TRAINED, name, state)


def load_training(folder: Path, name: str) -> dict[str, Any]:
    """Load what `save_training` wrote; see `load_checkpoint`."""
    return load_checkpoint(folder / _TRAINED, name)


def trainings(folder: Path) -> list[str]:
    """Names by which `save_training` has saved something in a run."""
    return sorted(path.stem for path in (folder / _TRAINED).glob("*.safetensors"))


def clear_trainings(folder: Path) -> None:
    """Remove all that `save_training` has saved in a run."""
    shutil.rmtree(folder / _TRAINED, ignore_errors=True)


def _load_checkpoint_of_v1(path: Path) -> dict[str, Any]:
    """A zip archive, whose checksums torch.load() does not compare; no code is run from it."""
    whole = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(whole, "w") as copy:
            for entry in archive.infolist():
                copy.writestr(entry.filename, archive.read(entry))
        whole.seek(0)
        state: dict[str, Any] = torch.load(whole, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {reason}): {RESTORE}"
        ) from error
    return state


def save_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write the record of a finished run."""
    write_json(folder / _METRICS, metrics)


def load_run(folder: Path) -> Trained:
    """Load the best model of a run folder.

    Raises:
        UserError: the folder is no run, has no model yet, or a file is damaged.
    """
    config, encoder, model, best = load_best(folder)
    with _fitting(folder):
        renumber(model.table, encoder, best.get("row_map"))
    model.eval()
    path = folder / _METRICS
    return Trained(config, encoder, model, read_json(path) if path.exists() else None)


def load_best(folder: Path) -> tuple[TrainConfig, Encoder, ClickModel, dict[str, Any]]:
    """Load the best model of a run folder as it was trained.

    Returns:
        Settings, vocabularies as fitted, the model in their numbers, and its checkpoint.

    Raises:
        UserError: the folder is no run, has no model yet, or a file is damaged.
    """
    require_threads()
    require_no_file(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {str(folder)!r}; make one with amtl train --out")
    config, encoder = load_inputs(folder)
    if not any((folder / f"best{end}").exists() for end in _ENDS):
        raise UserError(
            f"{folder} has no trained model yet; go on with amtl train --resume --out {folder}"
        )
    best = load_checkpoint(folder, "best")
    with _fitting(folder):
        model = build_model(config, encoder)
        model.load_state_dict(best["model"])
    return config, encoder, model, best


def load_earlier(folder: Path) -> Earlier:
    """Load a run for another one to go on from.

    Raises:
        UserError: the folder is no run, has no model yet, a file is damaged, or its method is one
            of the field.
    """
    return Earlier(folder, *load_best(folder))


@contextlib.contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except (*_INCONSISTENT, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the files of {folder} do not fit together ({reason}): {RESTORE}"
        ) from error


def renumber(table: nn.Module, encoder: Encoder, row_map: Tensor | None) -> None:
    """Bring a table into the form in which it is stored, and the vocabularies with it.

    Args:
        table: of the best model; if its sizes are still searched, they freeze as they are.
        encoder: numbered as fitted.
        row_map: how version 1 had renumbered rows in training.
    """
    if row_map is not None:
        encoder.renumber(row_map)
    elif methods.is_adaptive(table):
        if not methods.is_frozen(table):
            table.freeze()  # type: ignore[operator]
        encoder.renumber(table.absorb_order())  # type: ignore[operator]


def pack_run(
    folder: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    budget: str | None = None,
) -> Trained:
    """Write the best model of a run to one file, as `amtl.save` does; return it as loaded from it.

    Args:
        folder: a finished or stopped run.
        out: the file.
        dtype: of the stored embedding values; by default as trained, which keeps predictions
            bit for bit.
        bits: round them to numbers of 2, 4, 8 or 16 bits in place of that.
        budget: share of the bytes of a full table, or bytes, as `--budget` has it: rows are cut off
            in their principal components, in 8 bits if `bits` does not say otherwise.

    Raises:
        UserError: the run has no model yet, a file is damaged or cannot be written, or its numbers
            have few bits already.
    """
    require_no_part(out)
    trained = load_run(folder)
    model, config = trained.model, trained.config
    if methods.is_peer(model.table):
        raise UserError(
            f"{folder} is a run of --method {config.method}, which is there to be compared with "
            "and does not pack: amtl, rule and fixed do"
        )
    if budget is not None:
        model.table = cut_off(model, trained.encoder, config, budget, bits)
        renumber(model.table, trained.encoder, None)
    elif bits is not None:
        _round(model, trained, bits)
    if not methods.is_adaptive(model.table):
        dense = methods.table_parameters(model.table)[0].detach()
        model.table = table_of_tiers([dense], config.dim, isinstance(model.table, nn.EmbeddingBag))
    if dtype is not None and methods.few_bits(model.table):
        raise UserError(
            f"{folder} stores numbers of {methods.number_bits(model.table)} bits, which are packed "
            "as they are: leave the type of the embeddings out"
        )
    model.table.to(dtype)
    tensors, content = _packed_along(config, trained.encoder, trained.metrics or {})
    write_packed(out, "run", layers(model), model, metadata=content, tensors=tensors)
    return from_packed(open_packed(out))


def _packed_along(
    config: TrainConfig, encoder: Encoder, metrics: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a packed file holds beside the model: tensors, and JSON."""
    tensors, meta = encoder.to_tensors()
    tensors, codes = compact(tensors)
    skip = ("history", "config", "sizes")
    kept = {k: v for k, v in metrics.items() if k not in skip}
    return tensors, {"config": config.to_dict(), "encoder": meta, "codes": codes, "metrics": kept}


def mlp_bytes(model: ClickModel) -> int:
    """What all but the table of a model takes in a packed file."""
    return sum(tensor.nbytes for tensor in _dense(model))


def _dense(model: ClickModel) -> list[Tensor]:
    found = [pack(parameter.detach()) for parameter in model.dense_parameters()]
    return [tensor for pair in found for tensor in pair if tensor is not None]


def packed_bytes(
    config: TrainConfig, encoder: Encoder, model: ClickModel, metrics: Mapping[str, Any]
) -> tuple[int, int]:
    """About what `pack_run` writes, to within some per cent, and the vocabularies' part of it.

    Args:
        config: settings of the run.
        encoder: with the rows that are stored.
        model: at its best.
        metrics: of the run.

    Returns:
        Bytes of the file; of the vocabularies, but for their part of the header.
    """
    tensors, content = _packed_along(config, encoder, metrics)
    vocabularies = sum(tensor.nbytes for tensor in tensors.values())
    rest = _dense(model)
    numbers = vocabularies + sum(tensor.nbytes for tensor in (*rest, deflated(content)))
    layer, entries = {}, len(tensors) + len(rest) + 2
    if methods.is_adaptive(model.table):
        layer = model.table.config()  # type: ignore[operator]
        rounding: Any = model.table.rounding
        entries += len(layer["tier_ends"] or ()) if rounding is None else len(rounding.ends)
    # The header is JSON that holds JSON as text twice over, with two entries for each tensor.
    header = len(json.dumps(json.dumps(json.dumps(layer, separators=(",", ":")))))
    header += _ENTRY_BYTES * entries
    return methods.stored_bytes(model.table) + numbers + header, vocabularies


def _round(model: ClickModel, trained: Trained, bits: int) -> None:
    """Rounds a trained table; codes of each field and magnitude of the count share a step size."""
    table, config = model.table, trained.config
    if methods.few_bits(table):
        raise UserError(
            f"its numbers have {methods.number_bits(table)} bits, which are packed as they are: "
            "leave --bits out"
        )
    try:
        if methods.is_adaptive(table):
            table.thaw().freeze(bits=bits)  # type: ignore[operator]
            return
        options = {"bits": bits}
        layer = methods.build_table("fixed", trained.encoder, config.dim, options=options)
        with torch.no_grad():
            methods.table_parameters(layer)[0].copy_(methods.table_parameters(table)[0])
        model.table = layer.freeze(bits=bits).train(table.training)  # type: ignore[operator]
    except ValueError as error:
        raise UserError(f"--bits {bits}: {error}") from error


def from_packed(packed: PackedFile) -> Trained:
    """The model with its vocabularies that a file of `pack_run` holds; its table stays mapped.

    Raises:
        PackedFileError: the contents do not fit together.
    """
    require_threads()
    content = packed.metadata
    try:
        config = TrainConfig.from_dict(content["config"])
        encoder = _encoder(packed.tensors, content)
        with torch.device("meta"):
            model = assemble(config, encoder, nn.Identity())
        packed.into(model, assign=True)
        # Products of matrices round by where these lie, which a file does not keep.
        for parameter in model.dense_parameters():
            parameter.data = parameter.data.to(torch.float32, copy=True)
    except UserError:
        raise
    except _INCONSISTENT as error:
        raise PackedFileError(f"a packed run is inconsistent: {error!r}") from error
    model.eval()
    return Trained(config, encoder, model, content["metrics"])


def load_trained(path: Path) -> Trained:
    """Load a run folder or a packed run, for commands.

    Raises:
        UserError: there is no such thing, or a file is damaged.
    """
    if path.is_dir():
        return load_run(path)
    try:
        packed = open_packed(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}, nor a run folder") from error
    except TensorFileError:
        if not is_table(path):
            raise
        raise UserError(
            f"{path} is a table, no model: first the run or the file of amtl pack, then the data"
        ) from None
    if packed.kind != "run":
        raise UserError(
            f"{path} holds a {packed.kind} without vocabularies; name a run or a file of amtl pack"
        )
    return from_packed(packed)


def _read(path: Path, versions: Mapping[str, int]) -> tuple[FileTensors, str, int, Any]:
    """A file of a run, checked whole."""
    try:
        return read_document(path, versions, verify=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; run amtl train without --resume") from error


def _encoder_writer(encoder: Encoder) -> Callable[[Path], object]:
    tensors, meta = encoder.to_tensors()
    tensors, codes = compact(tensors, quickly=True)
    return document_writer("amtl-encoder", 2, tensors, {"encoder": meta, "codes": codes})


def _encoder(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Encoder:
    return Encoder.from_tensors(expand(tensors, content["codes"]), content["encoder"])
