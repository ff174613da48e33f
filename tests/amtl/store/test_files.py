"""Writing aside, checked JSON, checksums, and nested contents in tensor files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from amtl.errors import UserError
from amtl.store import files
from amtl.store import tensors as format_module
from amtl.store.files import FileWriteError, checksums, read_json, write_aside, write_json
from amtl.store.tensors import (
    PackedFileError,
    TensorFileError,
    compact,
    document_writer,
    expand,
    flatten,
    read_document,
    unflatten,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

# Writing aside


def text(content):
    return lambda path: path.write_text(content)


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "deep" / "er" / "x"
    write_aside({path: text("1")})
    write_aside({path: text("2"), tmp_path / "y": text("3")})
    assert (path.read_text(), (tmp_path / "y").read_text()) == ("2", "3")
    assert sorted(os.listdir(tmp_path)) == ["deep", "y"]
    assert os.listdir(path.parent) == ["x"]


def test_an_interruption_leaves_every_file_whole(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write_aside({first: text("1"), second: text("1")})

    def half(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside({first: text("2"), second: half})
    assert first.read_text() == second.read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EROFS, "you may write to"),
        (errno.EACCES, "you may write to"),
    ],
)
def test_what_the_system_refuses_is_told_in_a_line(tmp_path, monkeypatch, code, advice):
    path = tmp_path / "x"
    path.write_text("old")

    def refuses(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuses)
            with pytest.raises(FileWriteError, match=advice) as caught:
                write_aside({path: text("new")})
        assert isinstance(caught.value, UserError) and isinstance(caught.value, OSError)
        assert caught.value.errno == code and str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["x"]


def test_something_in_the_way(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileWriteError, match="a folder is in the way"):
        write_aside({tmp_path / "file": text("new"), tmp_path / "folder": text("new")})
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(FileWriteError, match="another name"):
        write_aside({tmp_path / "file" / "x": text("new")})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileWriteError, match="a device or pipe is in the way"):
        write_aside({tmp_path / "pipe": text("new")})
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


@pytest.fixture
def forbidden():
    """A folder that may be read but not written, with a file in it, as seen by nobody."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "x").write_text("old")
        folder.chmod(0o555)
        if user == 0:
            # Nothing is forbidden to root.
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_folder_that_may_not_be_written(forbidden):
    for path in (forbidden / "x", forbidden / "deeper" / "x"):
        with pytest.raises(FileWriteError, match="you may write to"):
            write_aside({path: text("new")})
    assert os.listdir(forbidden) == ["x"] and (forbidden / "x").read_text() == "old"


SLOW = """
import os, sys, time
from pathlib import Path
from amtl.store.files import write_aside
def slow(path):
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
write_aside({Path(sys.argv[1]): slow})
"""


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "writing\n"
        write_aside({tmp_path / "y": text("new")})
        assert len(os.listdir(tmp_path)) == 3, "the living one's stays"
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    finally:
        child.kill()
        child.stdout.close()
    assert path.read_text() == "old"
    (tmp_path / ".mine.part").mkdir()
    write_aside({tmp_path / "y": text("new")})
    assert sorted(os.listdir(tmp_path)) == [".mine.part", "x", "y"]


# JSON


def test_json(tmp_path):
    path = tmp_path / "c.json"
    content = {"a": [1, 2.5, None, float("inf")], "ü": {"x": "y"}}
    write_json(path, content)
    assert read_json(path) == content
    assert list(json.loads(path.read_text()))[:-1] == ["a", "ü"], "others can read it too"
    path.write_text(json.dumps(content))
    assert read_json(path) == content, "as files without a checksum are"
    for damaged in ("{", "", "[1]", "\0" * 50, '{"a": 1}x', b"\xff{}"):
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        with pytest.raises(UserError, match="damaged"):
            read_json(path)
    with pytest.raises(UserError, match=r"is .* a run"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path)


def test_every_flipped_bit_of_json_is_noticed(tmp_path):
    path = tmp_path / "c.json"
    content = {"test_auc": 0.75, "name": "a b", "rows": [10, 20], "none": None}
    write_json(path, content)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read_json(path) == content
        except UserError as error:
            assert "\n" not in str(error)


# Checksums


def test_pieces_and_threads_do_not_change_a_checksum(monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 1000)
    buffers = [memoryview(os.urandom(n)) for n in (0, 1, 999, 1000, 1001, 12_345)]
    expected = [zlib.crc32(buffer) for buffer in buffers]
    assert checksums(buffers) == expected
    for threads in (1, 3):
        monkeypatch.setattr(files.os, "sched_getaffinity", lambda _, n=threads: range(n))
        assert checksums(buffers) == expected
    assert checksums([]) == []


# Nested contents

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.integers(0, 5).map(lambda n: torch.arange(float(n))),
    st.integers(60, 70).map(lambda n: [0.1 * i for i in range(n)]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(
            st.one_of(st.text(max_size=3), st.sampled_from(["$x", "a.b", "a"])), inner, max_size=4
        ),
        st.dictionaries(st.integers(), inner, max_size=3),
    ),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


@given(TREES)
def test_trees_come_back_as_they_were(tree):
    tensors, flat = flatten(tree)
    again = unflatten(tensors, json.loads(json.dumps(flat)))
    assert type(again) is type(tree) and same(tree, again)


def test_states_of_modules_and_optimizers_come_back():
    model = nn.BatchNorm1d(3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tensors, flat = flatten(tree)
    again = unflatten(tensors, json.loads(json.dumps(flat)))
    assert same(again, tree)
    assert again["model"]._metadata == tree["model"]._metadata


def test_what_a_file_cannot_hold_is_refused_by_name():
    with pytest.raises(ValueError, match=r"state\.0\.x is a set"):
        flatten({"state": [{"x": {1}}]})
    with pytest.raises(ValueError, match="mark"):
        unflatten({}, {"$pickle": "x"})


INTS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30)


@given(INTS, INTS)
def test_compact_integers_come_back(wide, narrow):
    tensors = {
        "wide": torch.tensor(wide, dtype=torch.int64),
        "narrow": torch.tensor([n % 128 for n in narrow], dtype=torch.int8),
        "many": torch.tensor(sorted(narrow) * 20, dtype=torch.int64).view(-1, 2),
        "bytes": torch.tensor([n % 256 for n in narrow], dtype=torch.uint8),
        "floats": torch.rand(3),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(4, 0, dtype=torch.int32),
    }
    for worth, quickly in ((0, False), (-1000, False), (0, True)):
        with mock.patch.object(format_module, "_WORTH_A_CODE", worth):
            packed, codes = compact(tensors, quickly)
        again = expand(packed, json.loads(json.dumps(codes)))
        assert same(tensors, again)
        assert worth or all(packed[k].nbytes <= tensors[k].nbytes for k in tensors)


def test_compact_saves_what_it_can():
    tensors = {"counts": torch.arange(10_000, 0, -1), "ids": torch.arange(5_000) * 3}
    whole = sum(t.nbytes for t in tensors.values())
    for quickly in (False, True):
        packed, _ = compact(tensors, quickly)
        assert sum(t.nbytes for t in packed.values()) < 0.02 * whole


# Files with a kind and a version


def test_documents(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {"a": torch.arange(6).view(2, 3).T, "no columns": torch.zeros(7, 0)}
    write_aside({path: document_writer("amtl-thing", 1, tensors, {"k": 1})})
    read, kind, version, content = read_document(path, {"amtl-thing": 1})
    assert same(dict(read), tensors)
    assert (kind, version, content) == ("amtl-thing", 1, {"k": 1})
    with pytest.raises(PackedFileError, match="format 'amtl-thing', not amtl-other"):
        read_document(path, {"amtl-other": 1})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TensorFileError, match="corrupted"):
        read_document(path, {"amtl-thing": 1})
    write_aside({path: document_writer("amtl-thing", 2, {}, {})})
    with pytest.raises(PackedFileError, match="upgrade"):
        read_document(path, {"amtl-thing": 1})
