"""Packed files: round trips, memory maps, and everything that can be wrong with a file."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
import zlib
from collections import OrderedDict

import amtl
import pytest
import safetensors
import safetensors.torch
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag, PackedFileError, TensorFileError
from amtl.store import files
from amtl.store import packed as packed_module
from amtl.store import tensors as format_module
from amtl.store.packed import FORMAT, VERSION
from amtl.store.tensors import read_tensors, write_tensors
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.every(2)


def counts_of(rows=60, in_order=True):
    counts = (500 / torch.arange(1, rows + 1)).long()
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return counts if in_order else counts[shuffled]


def frozen(kind=AMTLEmbedding, rows=60, dim=8, in_order=True, **options):
    torch.manual_seed(0)
    options = {"budget": 0.4, "bits": None, **options}
    return kind(rows, dim, counts=counts_of(rows, in_order), **options).eval().freeze()


class Model(nn.Module):
    def __init__(self, table=None, bag=None):
        super().__init__()
        self.table = table or nn.Embedding(60, 8)
        self.bags = nn.ModuleList([bag or nn.EmbeddingBag(60, 8, mode="sum")])
        self.again = self.table
        self.norm = nn.BatchNorm1d(8)
        self.top = nn.Linear(8, 1)

    def forward(self, rows):
        return self.top(
            self.norm(self.table(rows).sum(1) + self.again(rows[:, 0]) + self.bags[0](rows))
        )


# Layers


@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_order", [True, False])
def test_layer_round_trip(tmp_path, kind, dtype, in_order):
    layer = frozen(kind, dtype=dtype, in_order=in_order, padding_idx=3, max_norm=9.0, sparse=True)
    path = tmp_path / "layer.safetensors"
    amtl.save(layer, path)
    loaded = amtl.load(path)
    rows = torch.randint(60, (9, 3))
    assert type(loaded) is kind and torch.equal(loaded.eval()(rows), layer(rows))
    for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "sparse", "options"):
        assert getattr(loaded, name) == getattr(layer, name)
    assert loaded.stored_bytes() == layer.stored_bytes()
    assert (loaded.row_order is None) == (layer.row_order is None) == in_order
    assert loaded.config() == layer.config()
    assert path.stat().st_size < layer.stored_bytes() + 4096


def test_what_an_order_takes_is_told_of(tmp_path):
    """Of rows so short that where they lie takes an eighth of what they do, or more."""
    path = tmp_path / "layer.safetensors"
    layers = {"short": frozen(in_order=False), "long": frozen(in_order=False, dim=128)}
    with pytest.warns(UserWarning, match=r"table 'short': 240 bytes .*absorb_order") as told:
        amtl.save(layers, path)
    assert len(told) == 1
    both = {**layers, "other": frozen(in_order=False)}
    with pytest.warns(UserWarning, match=r"tables 'short', 'other': 480 bytes .*") as told:
        amtl.save(both, path)
    assert len(told) == 1
    layers["short"].absorb_order()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amtl.save(layers, path)


def test_shards_of_tables_are_refused(tmp_path):
    """FSDP leaves each process a flat part, or a DTensor."""
    layers = {name: frozen() for name in "ab"}
    for block in layers["b"].blocks:
        block.data = block.data.flatten()[:7]
    with pytest.raises(ValueError, match=r"table 'b': only a shard is here, as under FSDP\."):
        amtl.save(layers, tmp_path / "layers.safetensors")
    for block in layers["a"].blocks:
        block.placements = ()
    with pytest.raises(ValueError, match=r"table 'a': only a shard.*full_state_dict=True.*load"):
        amtl.save({"a": layers["a"]}, tmp_path / "layers.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", [0.3, 0.125])
def test_a_file_of_few_bits_thaws_to_the_sizes_it_was_made_with(budget, tmp_path):
    counts = (5000 / torch.arange(1, 401)).long()
    model = nn.ModuleDict({"item": nn.Embedding(400, 16)})
    amtl.freeze(amtl.convert(model, {"item": counts}, budget))
    shown = model.eval()["item"](torch.arange(400)).detach()
    amtl.save(model, tmp_path / "model.safetensors")
    again = amtl.load(tmp_path / "model.safetensors", copy.deepcopy(model)).eval()
    again["item"].thaw(counts=counts)
    held = again["item"](torch.arange(400)).detach()
    assert float((held == shown).float().mean()) > 0.95
    amtl.freeze(again)
    assert again["item"].value_bytes() == model["item"].value_bytes()


def test_loaded_layer_trains_and_thaws(tmp_path):
    layer = frozen(in_order=False)
    path = tmp_path / "layer.safetensors"
    amtl.save(layer, path)
    content = path.read_bytes()
    loaded = amtl.load(path)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    rows = torch.arange(60)
    loaded(rows).square().sum().backward()
    optimizer.step()
    assert not torch.equal(loaded(rows), layer(rows))
    assert path.read_bytes() == content, "training on a map must not change the file"
    with pytest.raises(RuntimeError, match=r"thaw\(counts"):
        loaded.thaw()
    trained = loaded(rows)
    loaded.thaw(optimizer, counts=counts_of(in_order=False))
    assert loaded.phase == "search" and loaded.stored_fraction() <= 0.4
    assert torch.equal(loaded.eval()(rows), trained)
    again = amtl.load(path)
    amtl.save(again, path)
    assert path.read_bytes() == content


def test_layers_by_name_and_attachments(tmp_path):
    layers = {"user": frozen(), "tags.0": frozen(AMTLEmbeddingBag, mode="sum")}
    metadata = {"fields": ["a", "ü"], "nested": {"n": 1, "x": None}}
    tensors = {
        "vocabulary/user": torch.arange(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    path = tmp_path / "layers.safetensors"
    amtl.save(layers, path, metadata=metadata, tensors=tensors)
    loaded = amtl.load(path)
    rows = torch.randint(60, (5, 2))
    assert list(loaded) == list(layers)
    assert all(torch.equal(loaded[n](rows), layers[n](rows)) for n in layers)
    packed = amtl.open_packed(path)
    assert packed.metadata == metadata and packed.kind == "layers"
    assert packed.tensors.keys() == tensors.keys()
    assert all(torch.equal(packed.tensors[k], v) for k, v in tensors.items())


# Models


def test_model_round_trip(tmp_path):
    torch.manual_seed(0)
    model = Model(frozen(in_order=False), frozen(AMTLEmbeddingBag, mode="sum")).eval()
    model.norm.running_mean.normal_()
    path = tmp_path / "model.safetensors"
    amtl.save(model, path, metadata={"who": "me"})
    rows = torch.randint(60, (7, 3))
    fresh = Model().eval()
    assert amtl.load(path, fresh) is fresh
    assert torch.equal(fresh(rows), model(rows))
    assert fresh.table is fresh.again and not fresh.table.training
    packed = amtl.load(path)
    assert packed.aliases == {"again": "table"} and packed.metadata == {"who": "me"}
    assert set(packed.state) == {k for k in model.state_dict() if k.startswith(("norm", "top"))}
    assert torch.equal(packed.into(Model().eval())(rows), model(rows))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def eager(model):
    return torch.compile(model, backend="eager")


def top_compiled(model):
    model.top = eager(model.top)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        eager,
        DistributedDataParallel,
        nn.DataParallel,
        lambda model: eager(DistributedDataParallel(model)),
        lambda model: DistributedDataParallel(eager(model)),
        top_compiled,
    ],
    ids=["compiled", "ddp", "dp", "compiled ddp", "ddp compiled", "a part compiled"],
)
def test_wrapped_models(tmp_path, alone, wrap, monkeypatch):
    """They save under their own names, fill a model of either kind, and so did older files."""
    torch.manual_seed(0)
    model = Model(frozen(), frozen(AMTLEmbeddingBag, mode="sum")).eval()
    rows = torch.randint(60, (7, 3))
    expected = model(rows)
    path, plain, old = (tmp_path / name for name in ("wrapped", "plain", "old"))
    amtl.save(model, plain)
    wrapped = wrap(model).eval()
    amtl.save(wrapped, path)
    assert path.read_bytes() == plain.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(packed_module, "unwrapped", lambda model: model)
        patch.setattr(packed_module, "_own_name", lambda model, name: name)
        amtl.save(wrapped, old)
    assert old.read_bytes() != plain.read_bytes()
    for file in (plain, old):
        assert torch.equal(amtl.load(file, Model().eval())(rows), expected)
        other = wrap(Model()).eval()
        with torch.no_grad():
            assert not torch.equal(other(rows), expected)
        assert amtl.load(file, other) is other
        with torch.no_grad():
            assert torch.equal(other(rows), expected)


def test_a_wrapper_of_other_parameters_does_not_train(tmp_path, alone):
    path = tmp_path / "model"
    amtl.save(Model(frozen(), frozen(AMTLEmbeddingBag, mode="sum")), path)
    wrapped = DistributedDataParallel(Model())
    amtl.load(path, wrapped)
    with pytest.raises(RuntimeError, match="wrap anew"):
        wrapped(torch.randint(60, (7, 3)))


def test_wrapped_layers(tmp_path):
    layer, path = frozen(), tmp_path / "layer"
    amtl.save(eager(layer), path)
    assert torch.equal(amtl.load(path)(torch.arange(60)), layer(torch.arange(60)))
    amtl.save(nn.ModuleDict({"module": layer}), path)
    loaded = amtl.load(path, nn.ModuleDict({"module": nn.Embedding(60, 8)}))
    assert type(loaded["module"]) is AMTLEmbedding
    alone = nn.ModuleDict({"module": eager(nn.Embedding(60, 8))})
    with pytest.raises(PackedFileError, match="'module' of the model is wrapped by itself"):
        amtl.load(path, alone)
    assert type(alone["module"]._orig_mod) is nn.Embedding


def test_model_that_does_not_fit_is_left_alone(tmp_path):
    model = Model(frozen(), frozen(AMTLEmbeddingBag, mode="sum"))
    path = tmp_path / "model.safetensors"
    amtl.save(model, path)
    other = Model()
    other.top = nn.Linear(8, 2)
    other.extra = nn.Linear(1, 1)
    del other.again
    with pytest.raises(PackedFileError) as error:
        amtl.load(path, other)
    for part in ("again", "extra.weight", "top.weight"):
        assert part in str(error.value)
    assert type(other.table) is nn.Embedding


def embedding(kind=nn.Embedding, rows=60, dim=8, **options):
    return nn.ModuleDict({"table": kind(rows, dim, **options)})


def converted(model, budget=0.4):
    """In no order of counts, and of which rows of size 0 are looked up as row 1."""
    counts = counts_of(model["table"].num_embeddings, in_order=False)
    options = {"bits": None, "shared_rows": [1]}
    return amtl.convert(model, {"table": counts}, budget=budget, **options)


BAGS = {"kind": nn.EmbeddingBag}


@pytest.mark.filterwarnings("ignore:table 'table' stores")
@pytest.mark.parametrize("convert_first", [False, True])
@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        ({}, {"rows": 70}, r"shape \[60, 8\] in the file, \[70, 8\] in the model"),
        ({}, {"rows": 50}, r"shape \[60, 8\] in the file, \[50, 8\] in the model"),
        ({}, {"dim": 4}, r"shape \[60, 8\] in the file, \[60, 4\] in the model"),
        ({}, BAGS, "is an AMTLEmbedding in the file, an .*EmbeddingBag in the model"),
        (BAGS, {}, "is an AMTLEmbeddingBag in the file, an .*Embedding in the model"),
        (BAGS, {**BAGS, "mode": "sum"}, "mode mean in the file, sum in the model"),
        (
            {**BAGS, "include_last_offset": True},
            BAGS,
            "include_last_offset True in the file, False in the model",
        ),
        ({}, {"padding_idx": 3}, "padding_idx None in the file, 3 in the model"),
        ({"padding_idx": 0}, {"padding_idx": 3}, "padding_idx 0 in the file, 3 in the model"),
        ({"max_norm": 1.0}, {}, "max_norm 1.0 in the file, None in the model"),
        (
            {"max_norm": 1.0, "norm_type": 1.0},
            {"max_norm": 1.0},
            "norm_type 1.0 in the file, 2.0 in the model",
        ),
    ],
)
def test_embeddings_that_look_up_otherwise(tmp_path, saved, other, message, convert_first):
    path = tmp_path / "model.safetensors"
    amtl.save(amtl.freeze(converted(embedding(**saved))), path)
    model = embedding(**other)
    if convert_first:
        converted(model)
    table = model["table"]
    with pytest.raises(PackedFileError, match=f"'table' (has )?{message}"):
        amtl.load(path, model)
    assert model["table"] is table
    same = embedding(**saved)
    amtl.load(path, converted(same) if convert_first else same)
    assert same["table"].phase == "frozen"


@pytest.mark.filterwarnings("ignore:table 'table' stores")
def test_embeddings_of_which_nothing_differs(tmp_path):
    """Types, devices and norms that are not used; before and after rows were numbered anew."""
    path = tmp_path / "model.safetensors"
    model = amtl.freeze(converted(embedding(padding_idx=3, norm_type=1.0), budget=0.1))
    amtl.save(model, path)
    with torch.device("meta"):
        amtl.load(path, embedding(padding_idx=3, dtype=torch.float16))
    places = model["table"].absorb_order()
    rows = model["table"].num_embeddings
    assert rows < 60 and int(places[3]) != 3
    expected = model.eval()["table"](places)
    amtl.save(model, path)
    for fresh in (embedding(padding_idx=3), embedding(rows=rows, padding_idx=int(places[3]))):
        again = tmp_path / "again.safetensors"
        amtl.save(amtl.load(path, fresh), again)
        assert again.read_bytes() == path.read_bytes()
        assert torch.equal(fresh["table"](places), expected)
    with pytest.raises(PackedFileError, match=rf"shape \[{rows}, 8\] in the file, \[59, 8\]"):
        amtl.load(path, embedding(rows=59, padding_idx=3))


def test_a_collection_of_other_tables(tmp_path):
    def collection(**options):
        sizes = {"a": 40, "b": 20, **options.pop("sizes", {})}
        counts = {name: counts_of(rows) for name, rows in sizes.items()}
        made = amtl.AMTLEmbeddingCollection(sizes, 8, counts=counts, budget=0.4, **options)
        return nn.ModuleDict({"tables": made})

    path = tmp_path / "model.safetensors"
    paddings = {"a": 0, "b": 2}
    amtl.save(amtl.freeze(collection(padding_idx=paddings)), path)
    amtl.load(path, collection(padding_idx=paddings))
    for other, message in (
        ({"sizes": {"a": 20, "b": 40}, "padding_idx": paddings}, "field_sizes"),
        ({"sizes": {"c": 20}, "padding_idx": paddings}, "names"),
        ({"padding_idx": {"a": 0, "b": 1}}, "other_paddings"),
        ({"padding_idx": paddings, "mode": "mean"}, "mode"),
    ):
        with pytest.raises(PackedFileError, match=f"'tables' has {message}"):
            amtl.load(path, collection(**other))


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "x.safetensors"
    searching = AMTLEmbedding(5, 4, counts=torch.ones(5))
    for wrong, message in (
        (searching, "freeze"),
        (nn.Linear(2, 2), "no AMTL layer"),
        ({}, "no AMTL layer"),
        ({"a": nn.Embedding(2, 2)}, "not an AMTL layer"),
    ):
        with pytest.raises(ValueError, match=message):
            amtl.save(wrong, path)
    with pytest.raises(ValueError, match="JSON"):
        amtl.save(frozen(), path, metadata={"x": {1, 2}})
    with pytest.raises(ValueError, match="JSON"):
        amtl.save(frozen(), path, metadata=float("nan"))
    for tensor in (
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ):
        with pytest.raises(ValueError, match="cannot be packed"):
            amtl.save(frozen(), path, tensors={"x": tensor})

    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = frozen()

        def get_extra_state(self):
            return {"not": "a tensor"}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="not a tensor"):
        amtl.save(Extra(), path)
    assert not path.exists() and not list(tmp_path.iterdir())


# The format


def test_any_safetensors_reader_opens_it(tmp_path):
    layer = frozen(in_order=False)
    path = tmp_path / "layer.safetensors"
    amtl.save(layer, path, tensors={"flags": torch.tensor([True, False])})
    theirs = safetensors.torch.load_file(path)
    ours, metadata = read_tensors(path)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    with safetensors.safe_open(path, "pt") as file:
        (entry,) = file.metadata().values()
    assert json.loads(entry)["metadata"] == metadata
    assert metadata["format"] == FORMAT and metadata["version"] == "1"


def test_only_numbers_of_16_bits_need_the_second_version(tmp_path, monkeypatch):
    """So readers from before them open all others, and say of these that they are newer."""
    path = tmp_path / "layers.safetensors"
    for bits, version in ((16, 2), (8, 1)):
        layers = {"plain": frozen(), "few": frozen(bits=bits)}
        amtl.save(layers, path)
        assert read_tensors(path)[1]["version"] == str(version)
        found = amtl.load(path)["few"].eval()
        assert torch.equal(found(torch.arange(60)), layers["few"](torch.arange(60)))
        with monkeypatch.context() as before:
            before.setattr(packed_module, "VERSION", 1)
            if bits == 8:
                amtl.load(path)
                continue
            with pytest.raises(PackedFileError, match=r"version 2, .* up to 1: upgrade amtl"):
                amtl.load(path)


def test_rows_of_half_a_number_make_no_table(tmp_path):
    path = tmp_path / "layer.safetensors"
    amtl.save(frozen(bits=16), path)
    tensors, metadata = read_tensors(path)
    odd = {**tensors, "layers//blocks/0": tensors["layers//blocks/0"][:, 1:].contiguous()}
    write_tensors(path, odd, metadata)
    with pytest.raises(PackedFileError, match="do not make a table"):
        amtl.load(path)


def test_we_open_any_safetensors(tmp_path):
    path = tmp_path / "theirs.safetensors"
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.int8),
        "c": torch.randn(2).half(),
    }
    safetensors.torch.save_file(tensors, path)
    ours, _ = read_tensors(path)
    assert all(torch.equal(ours[k], v) for k, v in tensors.items())
    with pytest.raises(PackedFileError, match="not a packed AMTL file"):
        amtl.load(path)


def test_never_pickle(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    path = tmp_path / "layer.safetensors"
    amtl.save(frozen(), path)
    assert amtl.load(path).phase == "frozen"


# Files with something wrong


@pytest.fixture
def packed_path(tmp_path):
    path = tmp_path / "layer.safetensors"
    amtl.save(frozen(in_order=False), path, metadata={"key": "value"})
    return path


def test_every_truncation_is_noticed(packed_path):
    content = packed_path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        packed_path.write_bytes(content[:size])
        with pytest.raises(TensorFileError, match="truncated"):
            amtl.load(packed_path)
    packed_path.write_bytes(content + b"x")
    with pytest.raises(TensorFileError, match="corrupted"):
        amtl.load(packed_path)


def test_every_flipped_byte_is_noticed(packed_path):
    content = bytearray(packed_path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    padding = content[:length].rstrip(b" ")
    positions = [*range(0, len(padding), 7), *range(length, len(content), 11)]
    for position in positions:
        for flip in (0x01, 0x80):
            broken = bytearray(content)
            broken[position] ^= flip
            packed_path.write_bytes(broken)
            with pytest.raises(TensorFileError):
                amtl.load(packed_path)


def damage_last_value(path):
    """Flips a bit, in a new file: the old one may be mapped. Returns the content."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    return content


def test_large_files_are_verified_on_request(packed_path, monkeypatch):
    damage_last_value(packed_path)
    amtl.load(packed_path, verify=False)
    with pytest.raises(TensorFileError, match="checksum of tensor"):
        amtl.load(packed_path, verify=True)
    monkeypatch.setattr(format_module, "_CHECKED_AT_ONCE", 100)
    amtl.load(packed_path)


def test_other_files(tmp_path):
    path = tmp_path / "x"
    for content in (b"\x80\x04garbage" * 50, b"\x02" + b"\0" * 7 + b"[]", b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(TensorFileError, match="not a safetensors file"):
            amtl.load(path)
    with pytest.raises(FileNotFoundError):
        amtl.load(tmp_path / "absent")


def rewrite(path, change_metadata=None, change_config=None, drop=None):
    tensors, metadata = read_tensors(path)
    tensors = {k: v for k, v in tensors.items() if k != drop}
    metadata.update(change_metadata or {})
    if change_config:
        header = json.loads(metadata["amtl"])
        header["layers"][""].update(change_config)
        metadata["amtl"] = json.dumps(header)
    write_tensors(path, tensors, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change_metadata": {"version": str(VERSION + 1)}}, "upgrade amtl"),
        ({"change_metadata": {"version": "one"}}, "version"),
        ({"change_metadata": {"format": "other"}}, "not a packed AMTL file"),
        ({"change_metadata": {"amtl": "{"}}, "inconsistent"),
        ({"change_config": {"class": "Other"}}, "inconsistent"),
        ({"change_config": {"num_embeddings": 61}}, "do not make a table"),
        ({"change_config": {"embedding_dim": 2}}, "do not make a table"),
        ({"change_config": {"tier_ends": [60]}}, "do not make a table"),
        ({"change_config": {"options": {"bugdet": 1}}}, "inconsistent"),
        ({"drop": "layers//blocks/0"}, "inconsistent"),
    ],
)
def test_inconsistent_files(packed_path, change, message):
    rewrite(packed_path, **change)
    with pytest.raises(PackedFileError, match=message):
        amtl.load(packed_path)


# Interruptions


def test_interrupted_save_leaves_the_old_file_whole(packed_path, monkeypatch):
    content = packed_path.read_bytes()

    def fails_in_the_middle(tensors, path, metadata):
        path.write_bytes(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", fails_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        amtl.save(frozen(rows=90), packed_path)
    assert packed_path.read_bytes() == content
    assert list(packed_path.parent.iterdir()) == [packed_path], "no rest is left behind"
    assert amtl.load(packed_path).num_embeddings == 60


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_failures_of_the_system(packed_path, monkeypatch, where):
    content = packed_path.read_bytes()

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, where, fails)
    with pytest.raises(OSError, match="disk full"):
        amtl.save(frozen(rows=90), packed_path)
    monkeypatch.undo()
    assert packed_path.read_bytes() == content
    assert list(packed_path.parent.iterdir()) == [packed_path]


def test_a_full_disk(packed_path):
    """The library's error for a failed write is an OSError like any other."""
    content = packed_path.read_bytes()
    script = (
        "import resource, signal, sys, torch\n"
        "from amtl.store import tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    tensors.write_tensors(sys.argv[1], {'a': torch.ones(1000)}, {})\n"
        "except OSError:\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-B", "-c", script, str(packed_path)], check=False)
    assert done.returncode == 7
    assert packed_path.read_bytes() == content
    assert list(packed_path.parent.iterdir()) == [packed_path]


def test_files_are_readable_as_others_are(tmp_path):
    (tmp_path / "plain").touch()
    amtl.save(frozen(), tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def noted(*args, name=name, original=original):
            order.append(name)
            return original(*args)

        monkeypatch.setattr(files.os, name, noted)
    amtl.save(frozen(), tmp_path / "x")
    assert order == ["fsync", "replace", "fsync"]


def test_a_killed_save_leaves_the_old_file_whole(packed_path):
    content = packed_path.read_bytes()
    script = (
        "import os, sys, safetensors.torch, torch\n"
        "from amtl.store import tensors\n"
        "write = safetensors.torch.save_file\n"
        "def dies(*args):\n"
        "    write(*args); os._exit(9)\n"
        "safetensors.torch.save_file = dies\n"
        "tensors.write_tensors(sys.argv[1], {'a': torch.ones(1000)}, {})\n"
    )
    done = subprocess.run([sys.executable, "-B", "-c", script, str(packed_path)], check=False)
    assert done.returncode == 9
    assert packed_path.read_bytes() == content
    assert amtl.load(packed_path).num_embeddings == 60
    assert len(list(packed_path.parent.iterdir())) == 2
    amtl.save(frozen(), packed_path)
    assert list(packed_path.parent.iterdir()) == [packed_path], "the next save sweeps"


# Size and speed


def sparse_file(path, rows, dim, crc=None):
    """A packed table of rows * dim float32 zeros that takes no disk: a hole with a header."""
    layer = AMTLEmbedding(8, dim, counts=torch.ones(8), budget=1.0).freeze()
    config = {**layer.config(), "num_embeddings": rows, "tier_ends": [rows], "field_sizes": [rows]}
    header = {"kind": "layer", "layers": {"": config}, "aliases": {}, "metadata": None}
    entry = {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, rows * dim * 4]}
    metadata = {"format": FORMAT, "version": str(VERSION), "amtl": json.dumps(header)}
    name, shape = "layers//blocks/0", torch.empty(rows, dim, device="meta")
    if crc is None:
        block = bytes(1 << 20)
        assert rows * dim * 4 % len(block) == 0
        crc = 0
        for _ in range(rows * dim * 4 // len(block)):
            crc = zlib.crc32(block, crc)
    sealed = format_module._seal(metadata, {name: shape}, {name: f"{crc:08x}"})
    content = {"__metadata__": {format_module._ENTRY: sealed}, name: entry}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * dim * 4)


def test_a_gigabyte_opens_in_milliseconds_and_is_checked_when_used(tmp_path):
    path = tmp_path / "big.safetensors"
    sparse_file(path, 4_194_304, 64)
    assert path.stat().st_size > 2**30
    start = time.perf_counter()
    layer = amtl.load(path)
    seconds = time.perf_counter() - start
    out = layer(torch.tensor([0, 4_194_303]))
    assert out.shape == (2, 64) and layer.stored_bytes() == 2**30
    assert seconds < 0.1
    start = time.perf_counter()
    layer(torch.tensor([0, 4_194_303]))
    assert time.perf_counter() - start < 0.1, "the check is once"


def called(layer):
    return layer(torch.arange(5))


def compiled(layer):
    return torch.compile(layer, fullgraph=True, backend="eager")(torch.arange(5))


def pickled(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)(torch.arange(5))


def copied(layer):
    return copy.deepcopy(layer)(torch.arange(5))


def in_a_model(layer):
    return nn.Sequential(layer)(torch.arange(5))


def traced(layer):
    return torch.export.export(layer, (torch.arange(5),)).module()(torch.arange(5))


USES = [called, compiled, pickled, copied, in_a_model, traced]


@pytest.mark.parametrize("use", USES)
def test_a_large_file_is_checked_before_its_values_are_used(packed_path, monkeypatch, use):
    monkeypatch.setattr(format_module, "_CHECKED_AT_ONCE", 0)
    amtl.save(frozen(), packed_path)
    expected = called(amtl.load(packed_path, verify=True))
    layer = amtl.load(packed_path)
    for _ in range(3):
        assert torch.equal(use(layer), expected)
    assert torch.equal(called(layer), expected)
    assert not layer._forward_pre_hooks, "later calls cost nothing"
    content = damage_last_value(packed_path)
    layer = amtl.load(packed_path)
    for _ in range(2):
        with pytest.raises(Exception, match="corrupted: checksum of tensor"):
            use(layer)
    with pytest.raises(TensorFileError, match="checksum of tensor"):
        layer.state_dict()
    with pytest.raises(TensorFileError, match="checksum of tensor"):
        amtl.save(layer, packed_path)
    assert packed_path.read_bytes() == content


PAST_THE_CALL = {
    "dense_weight": lambda layer: layer.dense_weight(),
    "revert": lambda layer: amtl.revert(layer).weight,
    "thaw": lambda layer: layer.thaw(counts=torch.ones(60)).weight,
    "table_parameters": lambda layer: torch.cat([b.flatten() for b in layer.table_parameters()]),
    "row_dims": lambda layer: layer.row_dims(),
    "lookup": lambda layer: layer.lookup("a", torch.arange(5)),
    "table": lambda layer: layer.table("b")(torch.arange(5)),
}


@pytest.mark.parametrize("use", PAST_THE_CALL)
def test_a_large_file_is_checked_where_its_layer_is_not_called(packed_path, monkeypatch, use):
    monkeypatch.setattr(format_module, "_CHECKED_AT_ONCE", 0)
    layer = frozen(in_order=False)
    if use in ("lookup", "table"):
        rows = {"a": 50, "b": 10}
        counts = {name: torch.arange(n) for name, n in rows.items()}
        layer = amtl.AMTLEmbeddingCollection(rows, 8, counts=counts, budget=0.4).freeze()
    amtl.save(layer, packed_path)
    expected = PAST_THE_CALL[use](amtl.load(packed_path, verify=True))
    layer = amtl.load(packed_path)
    assert torch.equal(PAST_THE_CALL[use](layer), expected)
    assert not layer._forward_pre_hooks
    damage_last_value(packed_path)
    layer = amtl.load(packed_path)
    for _ in range(2):
        with pytest.raises(TensorFileError, match="corrupted: checksum of tensor"):
            PAST_THE_CALL[use](layer)


def test_values_changed_before_the_check_are_no_damage(packed_path, monkeypatch):
    monkeypatch.setattr(format_module, "_CHECKED_AT_ONCE", 0)
    layer = amtl.load(packed_path)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1)
    assert called(layer).max() == 1


def test_what_is_beside_the_layers_is_checked_when_taken_out(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    model = Model(frozen(in_order=False), frozen(AMTLEmbeddingBag, mode="sum")).eval()
    amtl.save(model, path, tensors={"good": torch.arange(3.0), "zzz": torch.full((7,), 8.25)})
    content = path.read_bytes()
    value = torch.full((7,), 8.25).numpy().tobytes()
    path.write_bytes(content.replace(value, bytes([1]) + value[1:]))
    with pytest.raises(TensorFileError, match="zzz"):
        amtl.load(path)
    monkeypatch.setattr(format_module, "_CHECKED_AT_ONCE", 0)
    packed = amtl.open_packed(path)
    assert packed.tensors["good"].tolist() == [0, 1, 2]
    for use in (lambda: packed.tensors["zzz"], lambda: copy.deepcopy(packed.tensors)):
        with pytest.raises(TensorFileError, match="zzz"):
            use()
    assert copy.deepcopy(packed.state).keys() == packed.state.keys()
    rows = torch.randint(60, (7, 3))
    assert torch.equal(packed.into(Model().eval())(rows), model(rows))
    with pytest.raises(TensorFileError, match="zzz"):
        amtl.open_packed(path, device="cpu")


def test_loaded_tensors_are_maps(packed_path):
    """Loading allocates no memory for the table: the tensors lie in a mapping of the file."""
    block = amtl.load(packed_path).blocks[0]
    address = block.data_ptr()
    with open("/proc/self/maps") as maps:
        owner = next(
            line
            for line in maps
            if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
        )
    assert str(packed_path) in owner


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    types = [torch.uint8, torch.float64, torch.int16, torch.bfloat16, torch.int32, torch.bool]
    tensors = {str(t): torch.ones(3, dtype=t) for t in types}
    write_tensors(tmp_path / "x", tensors, {})
    loaded, _ = read_tensors(tmp_path / "x")
    assert all(t.data_ptr() % t.element_size() == 0 for t in loaded.values())
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())


def test_parts_and_shared_memory(tmp_path):
    whole = torch.arange(9)
    tensors = OrderedDict(
        turned=torch.randn(4, 3).T, part=whole[2:5], overlapping=whole[3:], same=whole, tied=whole
    )
    write_tensors(tmp_path / "x", tensors, {})
    loaded, _ = read_tensors(tmp_path / "x")
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())


def test_parts_of_one_storage_are_not_copied(tmp_path):
    whole = torch.arange(40)
    parts = {"b": whole[20:], "a": whole[:20].view(4, 5), "none": whole[20:20]}
    assert all(t.data_ptr() == parts[k].data_ptr() for k, t in format_module._plain(parts).items())
    write_tensors(tmp_path / "x", parts, {})
    loaded, _ = read_tensors(tmp_path / "x")
    assert all(torch.equal(loaded[k], v) for k, v in parts.items())


def test_equal_contents_give_equal_bytes(tmp_path):
    tensors = {name: torch.arange(5) for name in "abc"}
    metadata = {name: name for name in "xyz"}
    write_tensors(tmp_path / "1", tensors, metadata)
    write_tensors(tmp_path / "2", dict(reversed(tensors.items())), metadata)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_writes_to_loaded_tensors_stay_private(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.zeros(5000)}, {})
    content = path.read_bytes()
    read_tensors(path)[0]["a"].fill_(1)
    assert path.read_bytes() == content
    assert not read_tensors(path)[0]["a"].any()
