"""Whatever happens to a file, what is read from it is an error or what was written.

AMTL_DAMAGE is the number of mutations of each file, AMTL_DAMAGE_SEED where they are.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import amtl
import pytest
import torch
from amtl import AMTLEmbedding
from amtl.errors import UserError
from amtl.run import folders
from amtl.run.config import TrainConfig
from amtl.run.training import start
from amtl.store import tensors as format_module
from amtl.store.files import read_json, write_json

COUNT = int(os.environ.get("AMTL_DAMAGE", "40"))
SEED = int(os.environ.get("AMTL_DAMAGE_SEED", "0"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, v1) -> Path:
    """A finished run, its packed file, a packed layer, and checkpoints of version 1."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    config = TrainConfig(
        data="synthetic:300",
        label="label",
        fields=["city", "hour", "truth"],
        dim=4,
        budget=0.5,
        hidden=[4],
        epochs=3,
        batch_size=80,
    )
    start(config, folder).run()
    folders.pack_run(folder, folder / "run.safetensors")
    layer = AMTLEmbedding(60, 8, counts=torch.arange(60), budget=0.4, padding_idx=3).freeze()
    amtl.save(layer, folder / "layer.safetensors", metadata={"a": 1})
    shutil.copytree(v1, folder, dirs_exist_ok=True)
    return folder


def inputs(path):
    config, encoder = folders.load_inputs(path.parent)
    return config.to_dict(), encoder.to_tensors()


def checkpoint(path):
    return folders.load_checkpoint(path.parent, path.stem)


def everything_packed(path):
    packed = amtl.open_packed(path)
    layers = {name: (layer.config(), layer.state_dict()) for name, layer in packed.layers.items()}
    return layers, dict(packed.state), dict(packed.tensors), packed.metadata, packed.aliases


READERS = {
    "config.json": inputs,
    "vocabulary.safetensors": inputs,
    "metrics.json": read_json,
    "checkpoint.safetensors": checkpoint,
    "best.safetensors": checkpoint,
    "run.safetensors": everything_packed,
    "layer.safetensors": everything_packed,
    "packed.safetensors": everything_packed,
    "finished/best.pt": checkpoint,
    "stopped/checkpoint.pt": checkpoint,
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


def damaged(content, draw):
    """One mutation: a bit, a cut, more bytes, a run of zeros, two parts exchanged."""
    kind = draw.choice(["bit", "bit", "bit", "byte", "cut", "longer", "zeros", "exchange"])
    at = draw.randrange(len(content))
    changed = bytearray(content)
    if kind == "bit":
        changed[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        changed[at] = draw.randrange(256)
    elif kind == "cut":
        del changed[at:]
    elif kind == "longer":
        changed += draw.choice([bytes(1), bytes(4096), draw.randbytes(100), content])
    elif kind == "zeros":
        size = draw.choice([64, 512, 4096])
        start = at // size * size
        changed[start : start + size] = bytes(len(changed[start : start + size]))
    else:
        size = min(64, len(content) - at)
        other = draw.randrange(len(content) - size + 1)
        first, second = content[at : at + size], content[other : other + size]
        changed[at : at + size], changed[other : other + size] = second, first
    return bytes(changed), f"{kind} at {at}"


# Packed files are also read as large ones are, whose tensors are checked at first touch.
CASES = [(name, False) for name in READERS]
CASES += [(name, True) for name, reader in READERS.items() if reader is everything_packed]


@pytest.mark.parametrize(("name", "lazily"), CASES)
def test_damage_is_an_error_or_harmless(folder, tmp_path, monkeypatch, name, lazily):
    if lazily:
        monkeypatch.setattr(format_module, "_CHECKED_AT_ONCE", 0)
    copy = Path(shutil.copytree((folder / name).parent, tmp_path / "copy"))
    path = copy / Path(name).name
    content, expected = path.read_bytes(), READERS[name](path)
    draw = random.Random(f"{name} {SEED}")
    for _ in range(COUNT):
        changed, what = damaged(content, draw)
        # A new file each time: a mapping of the last one may still be alive.
        path.unlink()
        path.write_bytes(changed)
        try:
            found = READERS[name](path)
        except UserError as error:
            assert changed != content, what
            assert "\n" not in str(error), what
        else:
            assert same(found, expected), what


@pytest.mark.parametrize("change", [{"label": None}, {"dim": "wide"}, {"epochs": []}])
def test_what_are_no_settings_is_an_error(folder, tmp_path, change):
    """With a checksum that fits."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = {**read_json(copy / "config.json"), **change}
    write_json(copy / "config.json", {k: v for k, v in content.items() if v is not None})
    for read in (folders.load_inputs, folders.load_run):
        with pytest.raises(UserError, match=r"config\.json holds no settings of a run"):
            read(copy)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.safetensors", "best.safetensors"])
def test_a_file_of_another_run_does_not_pass_for_this_one(folder, tmp_path, name):
    """What its checksum allows and its neighbours do not is an error too."""
    other = tmp_path / "other"
    config = TrainConfig(
        data="synthetic:300",
        label="label",
        fields=["shop", "hour"],
        dim=8,
        hidden=[4],
        epochs=3,
        batch_size=80,
    )
    start(config, other).run()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copy(other / name, copy / name)
    with pytest.raises(UserError, match="do not fit together") as caught:
        folders.load_run(copy)
    assert "\n" not in str(caught.value)
