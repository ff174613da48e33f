"""The C library gives what Python gives, bit for bit, and an error code for what it cannot read."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag, AMTLEmbeddingCollection
from amtl.layer.rounding import decode
from amtl.run import folders
from amtl.run.config import TrainConfig
from amtl.run.training import start
from amtl.store.tensors import document_writer, read_document
from safetensors.torch import save_file
from torch import nn

import amtl_kernels

from . import client
from .client import DAMAGED, MEAN, SUM, VERIFY, Library, ServeError

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("AMTL_TEST_CACHE", ROOT / "build")) / "serve-tests"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [None, 16, 8, 4, 2]


def built(name: str, *options: str) -> Path:
    """The folder of a build by CMake, anew where a source has changed."""
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(ROOT / "csrc" / "serve"), "-B", str(folder), "-GNinja"]
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in ([*configure, *options], ["cmake", "--build", str(folder), "-j2"]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr
            assert "warning:" not in result.stdout, result.stdout
    return folder


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(str(built("release") / "libamtl_serve.so"))


def some_layer(dtype, bits, kind=AMTLEmbeddingBag, rows=300, dim=24, seed=0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    counts = (2000 * torch.rand(rows, generator=generator) ** 6).long()
    torch.manual_seed(seed)
    arguments = {"padding_idx": 3, "budget": 0.4 if bits is None else 0.15} | arguments
    layer = kind(rows, dim, counts=counts, dtype=dtype, bits=bits, **arguments)
    return layer.freeze().eval()


def saved(layer, path):
    """The layer as Python reads it from a file written here."""
    amtl.save(layer, path)
    return amtl.open_packed(path, verify=True).layers[""].eval()


def equal_bits(found, expected):
    """Whether [n * D] floats are those of a tensor, signs of zeros included."""
    expected = expected.detach().to(torch.float32).contiguous()
    return bytes(found) == expected.reshape(-1).numpy().tobytes()


def drawn(rows, seed):
    """Indices with repetitions, and [B + 1] offsets with empty bags."""
    draw = random.Random(seed)
    indices = [min(draw.randrange(rows), draw.randrange(rows)) for _ in range(500)] + [3] * 4
    ends = sorted(draw.randrange(500) for _ in range(60))
    return indices, [0, 0, *ends, 500, 502, len(indices)]


def bags_of_kernel(layer, indices, offsets, mode, weights=None):
    """What the CPU kernel gives in float32 for the numbers that the layer stores."""
    blocks = [block.detach() for block in layer.blocks]
    if layer.steps is not None:
        blocks = [
            decode(b, s, layer.options.bits) for b, s in zip(blocks, layer.steps, strict=True)
        ]
    return amtl_kernels.tiered_embedding_bag(
        [block.to(torch.float32) for block in blocks],
        layer.tier_ends,
        layer._frozen_rows(indices),
        offsets,
        mode=mode,
        per_sample_weights=weights,
        embedding_dim=layer.embedding_dim,
        padding_idx=layer._frozen_padding(),
        include_last_offset=True,
    )


@pytest.mark.every(3)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_python(library, tmp_path, dtype, bits):
    for seed, arguments in enumerate([{}, {"shared_rows": "rarest"}, {"dim": 200, "rows": 90}]):
        layer = saved(
            some_layer(dtype, bits, AMTLEmbedding, seed=seed, **arguments), tmp_path / "f"
        )
        indices = torch.randint(layer.num_embeddings, (333,))
        with library.open(tmp_path / "f") as file, torch.no_grad():
            (found,) = file.layers()
            assert (found.rows, found.dim) == (layer.num_embeddings, layer.embedding_dim)
            assert found.padding == 3
            assert found.bits == (bits or 8 * dtype.itemsize)
            for narrow in (False, True):
                assert equal_bits(found.lookup(indices.tolist(), narrow), layer(indices))
            assert len(found.lookup([])) == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_basis_is_multiplied_by(library, tmp_path, dtype, bits):
    """But for the order of sums, in float32."""
    for kind in (AMTLEmbedding, AMTLEmbeddingBag):
        layer = kind(
            300, 24, padding_idx=3, counts=torch.arange(300).flip(0), dtype=dtype, bits=bits
        )
        layer.to_principal_basis().freeze().eval()
        layer = saved(layer, tmp_path / "f")
        layer.include_last_offset = True
        indices, offsets = drawn(300, 1)
        tensors = torch.tensor(indices), torch.tensor(offsets)
        with library.open(tmp_path / "f") as file, torch.no_grad():
            found = file.find("")
            if kind is AMTLEmbedding:
                results = [(found.lookup(indices), layer(tensors[0]))]
                assert not any(found.lookup([3]))
            else:
                layer.mode = "sum"
                summed = layer(*tensors)
                layer.mode = "mean"
                results = [
                    (found.bags(indices, offsets, mode=SUM), summed),
                    (found.bags(indices, offsets, mode=MEAN), layer(*tensors)),
                ]
        tensors, _, _, content = read_document(tmp_path / "f", {"amtl-packed": 4})
        odd = {"layers//basis": torch.ones(24, 23)}
        document_writer("amtl-packed", 4, {**tensors, **odd}, content)(tmp_path / "odd")
        with pytest.raises(ServeError, match=r"basis. does not fit its table"):
            library.open(tmp_path / "odd")
        rough = 2e-5 if dtype == torch.float32 else 0.05
        for given, expected in results:
            given = torch.tensor(list(given)).view(expected.shape)
            assert torch.allclose(given, expected.float(), atol=rough, rtol=rough)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bags_are_those_of_the_kernel(library, tmp_path, dtype, bits):
    """In float32, where Python rounds them to the table's type."""
    for seed, arguments in enumerate([{}, {"shared_rows": "rarest"}, {"dim": 200, "rows": 90}]):
        layer = saved(some_layer(dtype, bits, seed=seed, **arguments), tmp_path / "f")
        indices, offsets = drawn(layer.num_embeddings, seed)
        weights = torch.randn(len(indices)).to(dtype)
        tensors = torch.tensor(indices), torch.tensor(offsets)
        layer.include_last_offset = True
        with library.open(tmp_path / "f") as file, torch.no_grad():
            found = file.find("")
            for mode, name, given in (
                (SUM, "sum", None),
                (SUM, "sum", weights),
                (MEAN, "mean", None),
            ):
                wide = None if given is None else given.float()
                told = None if given is None else wide.tolist()
                bags = found.bags(indices, offsets, mode, told)
                assert equal_bits(bags, bags_of_kernel(layer, *tensors, name, wide)), name
                assert found.bags(indices, offsets, mode, told, narrow=True) == bags
                layer.mode = name
                python = layer(*tensors, given)
                rounded = torch.tensor(bags).reshape(python.shape).to(dtype)
                # Numbers of codes with steps of 16 bits are not rounded before they are pooled.
                if bits is None or dtype == torch.float32:
                    assert torch.equal(rounded, python), name


def test_without_row_order_and_with_a_row_for_all_others(library, tmp_path):
    counts = torch.arange(200).flip(0) ** 2
    # A row as wide as the shared one, so that it stays first, and places need no order.
    counts[0] = 10**9
    for shared in (None, [150], [0], [1]):
        layer = AMTLEmbeddingBag(
            200, 8, counts=counts, budget=0.2, shared_rows=shared, padding_idx=7
        )
        layer = saved(layer.freeze(), tmp_path / "f")
        indices, offsets = drawn(200, 1)
        with library.open(tmp_path / "f") as file, torch.no_grad():
            found = file.find("")
            expected = layer.dense_weight()
            assert equal_bits(found.lookup(range(200)), expected)
            bags = bags_of_kernel(layer, torch.tensor(indices), torch.tensor(offsets), "mean")
            assert equal_bits(found.bags(indices, offsets, MEAN), bags)
    assert layer.row_order is None


def test_zeros_and_what_is_not_finite(library, tmp_path):
    layer = some_layer(torch.float16, None, AMTLEmbedding, rows=40, dim=8)
    with torch.no_grad():
        values = torch.tensor([-0.0, 0.0, 6e-8, -6e-8, 65504, float("inf"), float("-inf")])
        for block in layer.blocks:
            block.copy_(values[torch.arange(block.numel()) % 7].reshape(block.shape))
    layer = saved(layer, tmp_path / "f")
    with library.open(tmp_path / "f") as file, torch.no_grad():
        assert equal_bits(file.find("").lookup(range(40)), layer(torch.arange(40)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = some_layer(torch.float32, None, AMTLEmbedding)
        self.again = self.items
        self.users = some_layer(torch.bfloat16, 4, AMTLEmbeddingBag, mode="mean", seed=1)
        self.head = nn.Linear(24, 1)


def test_models_with_all_their_names(library, tmp_path):
    model = Model()
    amtl.save(model, tmp_path / "m", metadata={"π": [1, {"a": None}], "n": 1e-9})
    with library.open(tmp_path / "m") as file, torch.no_grad():
        assert file.kind == "model"
        assert [layer.name for layer in file.layers()] == ["items", "users"]
        assert file.find("again").handle == file.find("items").handle
        assert (file.find("items").mode, file.find("users").mode) == (SUM, MEAN)
        indices = torch.arange(300)
        assert equal_bits(file.find("again").lookup(range(300)), model.items(indices))
        with pytest.raises(KeyError):
            file.find("head")


def test_several_layers(library, tmp_path):
    layers = {"ä.b": some_layer(torch.float32, 2), '"\\': some_layer(torch.float16, None)}
    amtl.save(layers, tmp_path / "l")
    packed = amtl.open_packed(tmp_path / "l")
    with library.open(tmp_path / "l") as file:
        assert file.kind == "layers"
        for name, layer in packed.layers.items():
            assert equal_bits(file.find(name).lookup(range(300)), layer.dense_weight())


def test_collections_by_table(library, tmp_path):
    sizes = {"user": 70, "item": 200, "day": 7}
    counts = {name: torch.randint(1, 500, (rows,)) ** 2 for name, rows in sizes.items()}
    layer = AMTLEmbeddingCollection(sizes, 16, counts=counts, budget=0.3, mode="mean")
    layer = saved(layer.freeze(), tmp_path / "c")
    with library.open(tmp_path / "c") as file, torch.no_grad():
        found = file.find("")
        assert [(t.name, t.rows) for t in found.tables()] == list(sizes.items())
        for name, rows in sizes.items():
            table = found.table(name)
            expected = layer.lookup(name, torch.arange(rows))
            assert equal_bits(table.lookup(range(rows)), expected)
            for outside in (rows, -1):
                with pytest.raises(ServeError, match=f"of {rows} rows") as caught:
                    table.lookup([0, outside])
                assert caught.value.status == client.INDEX
        with pytest.raises(KeyError):
            found.table("nobody")
        assert found.table("item").tables() == []


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("shared", [None, "rarest"])
@pytest.mark.parametrize("value", [0.5, 0.0])
def test_padding_rows_of_tables(library, bits, shared, value, tmp_path):
    """They have one place; with a budget for all rows of few bits nothing says where others lie."""
    sizes, paddings = {"user": 70, "item": 200, "day": 7}, {"user": 3, "day": 6}
    counts = {name: torch.randint(1, 500, (rows,)) ** 2 for name, rows in sizes.items()}
    weight = torch.randn(277, 16)
    weight[[3, 276]] = value
    budget = 0.1 if value else 0.2
    options = {"counts": counts, "budget": budget, "bits": bits, "shared_rows": shared}
    layer = AMTLEmbeddingCollection(sizes, 16, padding_idx=paddings, _weight=weight, **options)
    layer = saved(layer.freeze(), tmp_path / "c")
    assert layer.tier_ends[-1] < 277
    stays = bits == 4 and not value
    assert (layer.told_order() is None) == stays
    with library.open(tmp_path / "c") as file, torch.no_grad():
        assert [t.padding for t in file.find("").tables()] == [3, -1, 6]
        for name, rows in sizes.items():
            table = file.find("").table(name)
            every = torch.arange(rows)
            assert equal_bits(table.lookup(range(rows)), layer.lookup(name, every))
            row = paddings.get(name, 0)
            bag = list(table.bags([row, 5, row, row], [0, 2, 3, 4]))
            shown = [0.0] * 16 if name in paddings else layer.lookup(name, every[:1])[0].tolist()
            assert bag[16:] == [*shown, *shown]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "run"
    config = TrainConfig(
        data="synthetic:300",
        label="label",
        fields=["city", "hour"],
        dim=4,
        budget=0.5,
        hidden=[4],
        epochs=2,
        batch_size=80,
    )
    start(config, folder).run()
    folders.pack_run(folder, folder / "run.safetensors")
    return folder / "run.safetensors"


def test_packed_runs(library, run):
    packed = amtl.open_packed(run)
    with library.open(run) as file:
        assert file.kind == "run"
        assert [layer.name for layer in file.layers()] == list(packed.layers)
        for name, layer in packed.layers.items():
            rows = range(layer.num_embeddings)
            assert equal_bits(file.find(name).lookup(rows), layer.dense_weight())


def test_wrong_arguments_are_error_codes(library, tmp_path):
    layer = some_layer(torch.float32, None)
    amtl.save(layer, tmp_path / "f")
    with library.open(tmp_path / "f") as file:
        found = file.find("")
        cases = [
            (client.INDEX, "index 300 at position 1", lambda: found.lookup([0, 300])),
            (client.INDEX, "index -1 at position 0", lambda: found.lookup([-1], narrow=True)),
            (client.INDEX, "position 2", lambda: found.bags([0, 1, 1 << 40], [0, 1, 3])),
            (client.ARGUMENT, "start at 0", lambda: found.bags([0, 1], [1, 2])),
            (client.ARGUMENT, r"offsets\[2\]", lambda: found.bags([0, 1], [0, 2, 1, 2])),
            (client.ARGUMENT, "end within", lambda: found.bags([0, 1], [0, 3])),
            (client.ARGUMENT, "AMTL_SUM only", lambda: found.bags([0], [0, 1], MEAN, [1.0])),
            (client.ARGUMENT, "mode", lambda: found.bags([0], [0, 1], 2)),
            (client.ARGUMENT, "flags", lambda: library.open(tmp_path / "f", 2)),
            (client.IO, "No such file", lambda: library.open(tmp_path / "nothing")),
            (client.FORMAT, "plain file", lambda: library.open(tmp_path)),
        ]
        for status, text, call in cases:
            with pytest.raises(ServeError, match=text) as caught:
                call()
            assert caught.value.status == status
        # What is behind the last bag is in none.
        assert len(found.bags([0, 300], [0, 1])) == 24
        assert library.c.amtl_lookup(found.handle, None, 1, None) == client.ARGUMENT
        assert library.c.amtl_lookup(None, None, 0, None) == client.ARGUMENT
        assert library.c.amtl_lookup(found.handle, None, 0, None) == client.OK
        assert library.c.amtl_open(None, 0, None) == client.ARGUMENT
    library.c.amtl_close(None)


def test_what_is_not_served_says_why(library, tmp_path):
    for arguments, text in (({"max_norm": 1.0}, "max_norm"), ({"dtype": torch.float64}, "F64")):
        arguments = {"dtype": torch.float32, "bits": None} | arguments
        amtl.save(some_layer(kind=AMTLEmbedding, **arguments), tmp_path / "f")
        with library.open(tmp_path / "f") as file:
            found = file.find("")
            for call in (lambda f=found: f.lookup([0]), lambda f=found: f.bags([0], [0, 1])):
                with pytest.raises(ServeError, match=text) as caught:
                    call()
                assert caught.value.status == client.UNSUPPORTED


def test_many_threads_at_once(library, tmp_path):
    layer = saved(some_layer(torch.float32, 4), tmp_path / "f")
    with library.open(tmp_path / "f") as file, torch.no_grad():
        found = file.find("")

        def work(seed):
            indices, offsets = drawn(300, seed)
            for _ in range(30):
                bags = found.bags(indices, offsets, MEAN)
                with pytest.raises(ServeError, match=f"index {300 + seed} "):
                    found.lookup([300 + seed])
            return indices, offsets, bags

        with ThreadPoolExecutor(8) as pool:
            for indices, offsets, bags in pool.map(work, range(16)):
                tensors = torch.tensor(indices), torch.tensor(offsets)
                assert equal_bits(bags, bags_of_kernel(layer, *tensors, "mean"))


def write_sparse(path, config, tensors, size):
    """A file of tensors that are holes: {name: (dtype, torch's name, shape, bytes)}."""
    metadata = {
        "format": "amtl-packed",
        "version": "1",
        "amtl": json.dumps(
            {"kind": "layer", "layers": {"": config}, "aliases": {}, "metadata": None}
        ),
    }
    seal = {
        "metadata": metadata,
        "tensors": {n: [t, shape, "00000000"] for n, (_, t, shape, _) in tensors.items()},
    }
    seal["crc32"] = f"{zlib.crc32(json.dumps(seal).encode()):08x}"
    header, at = {"__metadata__": {"amtl.tensorfile": json.dumps(seal)}}, 0
    for name, (dtype, _, shape, count) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)


def test_a_table_of_any_size_opens_in_milliseconds(library, tmp_path):
    """A hundred thousand million bytes, which no disk is asked for: they are holes."""
    rows, dim = 400_000_000, 64
    config = some_layer(torch.float32, None, AMTLEmbedding, padding_idx=None).config()
    config |= {"num_embeddings": rows, "embedding_dim": dim, "tier_ends": [rows]}
    size = rows * dim * 4
    path = tmp_path / "big"
    write_sparse(path, config, {"layers//blocks/0": ("F32", "float32", [rows, dim], size)}, size)
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        with library.open(path, 0) as file:
            took.append(time.perf_counter() - begin)
            assert set(file.find("").lookup([0, rows - 1])) == {0.0}
    assert min(took) < 0.05
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(torch.tensor([1.5]).numpy().tobytes())
    with library.open(path, 0) as file:
        assert file.find("").lookup([rows - 1])[-1] == 1.5


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "small"
    layers = {
        "a": some_layer(torch.float16, None, rows=40, dim=8),
        "b": some_layer(torch.float32, 4, rows=30, dim=8, shared_rows="rarest"),
        "c": AMTLEmbeddingCollection(
            [9, 5], 8, counts=[range(9), range(5)], budget=0.3, bits=None, padding_idx=[0, 0]
        ).freeze(),
    }
    amtl.save(layers, path, metadata={"text": "x" * 20})
    return path


def test_every_damaged_byte_is_an_error_or_harmless(library, small, tmp_path):
    whole = client.outcome(library, str(small), VERIFY)
    assert isinstance(whole, list)
    path, seen = tmp_path / "damaged", set()
    for changed, what in client.mutations(small.read_bytes(), 1, 0):
        path.write_bytes(changed)
        found = client.outcome(library, str(path), VERIFY)
        assert isinstance(found, int) or found == whole, what
        seen.add(found if isinstance(found, int) else "harmless")
    assert {client.FORMAT, DAMAGED} <= seen <= {client.FORMAT, DAMAGED, "harmless"}


def test_values_are_checked_if_asked_for(library, small, tmp_path):
    path = tmp_path / "damaged"
    content = bytearray(small.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    library.open(path, 0).__exit__()
    with pytest.raises(ServeError, match="damaged: checksum of tensor") as caught:
        library.open(path, VERIFY)
    assert caught.value.status == DAMAGED


def test_other_versions_and_other_files(library, small, tmp_path):
    tensors, _, _, content = read_document(small, {"amtl-packed": 1})
    path = tmp_path / "other"
    document_writer("amtl-packed", 5, tensors, content)(path)
    with pytest.raises(ServeError, match="format version 5, this library reads up to 4") as caught:
        library.open(path)
    assert caught.value.status == client.VERSION
    for kind, status in (("amtl-checkpoint", client.FORMAT), ("amtl-model", client.FORMAT)):
        document_writer(kind, 1, tensors, content)(path)
        with pytest.raises(ServeError) as caught:
            library.open(path)
        assert caught.value.status == status
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ServeError, match="not a packed file of amtl") as caught:
        library.open(path)
    assert caught.value.status == client.FORMAT


def test_values_need_not_be_aligned(library, small, tmp_path):
    """The format does not say that they are."""
    content = small.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for spaces in (1, 2, 3):
        path = tmp_path / "unaligned"
        header = content[8 : 8 + length] + b" " * spaces
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        found = client.outcome(library, str(path), VERIFY)
        assert found == client.outcome(library, str(small), VERIFY)


def inconsistent(small, folder, count):
    """Files with right checksums whose headers or row numbers are not those of their tensors."""
    tensors, _, _, content = read_document(small, {"amtl-packed": 1})
    tensors = dict(tensors)
    draw = random.Random(0)
    values = [-1, 0, 1, 31, 1 << 31, 1 << 62, 1 << 70, 0.5, "", "x", None, True, [], {}, [0], [-5]]

    def places(tree, path=()):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            yield (*path, key)
            if isinstance(value, (dict, list)):
                yield from places(value, (*path, key))

    relevant = [p for p in places(content) if "options" not in p or p[-1] in ("options", "bits")]
    for number in range(count):
        changed, others = copy.deepcopy(content), dict(tensors)
        if number % 4 == 0:
            name = draw.choice(sorted(others))
            tensor = others.pop(name).clone()
            if number % 3 == 0:
                others[name + draw.choice("0x")] = tensor
            elif number % 3 == 1:
                others[name] = tensor.reshape(-1)[: draw.randrange(1 + tensor.numel())]
            else:
                others[name] = torch.full_like(tensor, draw.choice([-1, 1 << 30, 29, 40]) % 251)
        else:
            *path, last = draw.choice(relevant)
            tree = changed
            for key in path:
                tree = tree[key]
            tree[last] = draw.choice(values)
        path = folder / f"inconsistent{number}"
        document_writer("amtl-packed", 1, others, changed)(path)
        yield path


def test_places_that_are_not_there_are_an_error(library, tmp_path):
    path = tmp_path / "f"
    amtl.save(some_layer(torch.float32, None, AMTLEmbedding), path)
    tensors, _, _, content = read_document(path, {"amtl-packed": 1})
    tensors = dict(tensors)
    for place in (-1, 300, 2**31 - 1):
        order = tensors["layers//row_order"].clone()
        order[5] = place
        document_writer("amtl-packed", 1, tensors | {"layers//row_order": order}, content)(path)
        with library.open(path) as file:
            with pytest.raises(ServeError, match="row 5 of layer") as caught:
                file.find("").lookup([4, 5])
            assert caught.value.status == DAMAGED
            file.find("").lookup([4])


def test_padding_rows_need_their_places(library, small, tmp_path):
    tensors, _, _, content = read_document(small, {"amtl-packed": 1})
    tensors, path = dict(tensors), tmp_path / "f"
    without = {name: t for name, t in tensors.items() if name != "layers/c/row_order"}
    document_writer("amtl-packed", 1, without, content)(path)
    with pytest.raises(ServeError, match=r"no tensor .*layers/c/row_order") as caught:
        library.open(path)
    assert caught.value.status == DAMAGED
    content["layers"]["c"]["other_paddings"] = [14]
    document_writer("amtl-packed", 1, tensors, content)(path)
    with pytest.raises(ServeError, match="has no padding row"):
        library.open(path)


def test_rows_of_half_a_number_are_damaged(library, tmp_path):
    path = tmp_path / "f"
    amtl.save(some_layer(torch.float32, 16, AMTLEmbedding), path)
    tensors, _, version, content = read_document(path, {"amtl-packed": 4})
    odd = {"layers//blocks/0": tensors["layers//blocks/0"][:, 1:].contiguous()}
    document_writer("amtl-packed", version, {**tensors, **odd}, content)(path)
    with pytest.raises(ServeError, match="do not make its table") as caught:
        library.open(path)
    assert caught.value.status == DAMAGED


def test_inconsistent_files_are_an_error_or_harmless(library, small, tmp_path):
    codes = []
    for path in inconsistent(small, tmp_path, 120):
        found = client.outcome(library, str(path), VERIFY)
        codes.append(found if isinstance(found, int) else client.OK)
    assert codes.count(DAMAGED) > 60
    assert set(codes) <= {client.OK, DAMAGED}


@pytest.mark.slow
def test_clean_under_the_sanitizers(small, tmp_path):
    """Damaged and inconsistent files, in a process whose library is built with both sanitizers."""
    folder = built("sanitized", "-DAMTL_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug")
    preload = [
        subprocess.run(
            [os.environ.get("CXX", "g++"), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    copied = tmp_path / "small"
    copied.write_bytes(small.read_bytes())
    paths = [copied, *inconsistent(small, tmp_path, 60)]
    result = subprocess.run(
        [
            sys.executable,
            str(Path(client.__file__)),
            str(folder / "libamtl_serve.so"),
            *map(str, paths),
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preload),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
        },
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip().endswith("clean")


def test_the_example_prints_rows(tmp_path):
    layer = saved(some_layer(torch.float32, 8, AMTLEmbedding), tmp_path / "f")
    program = str(built("release") / "amtl_serve_example")

    def run(*arguments):
        return subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    assert run(tmp_path / "f").stdout == '"" 300 x 24, 8 bits\n'
    printed = run(tmp_path / "f", "", 7, 0)
    assert printed.returncode == 0
    found = torch.tensor([[float(x) for x in line.split()] for line in printed.stdout.splitlines()])
    assert torch.equal(found, layer(torch.tensor([7, 0])))
    missing = run(tmp_path / "nothing")
    assert missing.returncode == 1 and "No such file" in missing.stderr
    outside = run(tmp_path / "f", "", 300)
    assert outside.returncode == 1 and "out of range" in outside.stderr


def test_ten_lines(tmp_path):
    """What the documentation shows is C99, and runs."""
    (code,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    layer = some_layer(torch.float32, None, AMTLEmbedding, dim=32)
    amtl.save({"item": layer}, tmp_path / "model.safetensors")
    (tmp_path / "main.c").write_text(code)
    folder = built("release")
    compiler = [os.environ.get("CC", "cc"), "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    linking = [f"-I{ROOT / 'csrc'}", f"-L{folder}", "-lamtl_serve", f"-Wl,-rpath,{folder}"]
    subprocess.run([*compiler, "main.c", "-o", "main", *linking], cwd=tmp_path, check=True)
    printed = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = layer(torch.tensor([3, 14, 15])).detach()
    bags = bags_of_kernel(layer, torch.tensor([3, 14, 15]), torch.tensor([0, 2, 3]), "mean")
    expected = torch.stack([rows[2, 0], bags[0, 0]])
    assert torch.equal(torch.tensor([float(x) for x in printed.stdout.split()]), expected)
