from __future__ import annotations

import os

import pytest
import torch
from amtl.checkpoint import (
    load_checkpoint,
    read_json,
    save_checkpoint,
    write_atomically,
    write_json,
)
from amtl.errors import UserError
from amtl.storage import load_tensors, save_tensors


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "c.pt"
    state = {"w": torch.arange(3.0), "n": [1, {"a": None}], "x": 0.1}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["w"], state["w"])
    assert (loaded["n"], loaded["x"]) == (state["n"], state["x"])


def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


class Malicious:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"garbage", "damaged"),
        (None, "there is no checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "c.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_checkpoint(path)


def test_checkpoints_run_no_code(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"x": Malicious()})
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_truncated_and_newer_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.rand(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    save_checkpoint(path, {"format": 99})
    with pytest.raises(UserError, match="upgrade"):
        load_checkpoint(path)


def test_json(tmp_path):
    path = tmp_path / "c.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert read_json(path) == {"a": [1, 2.5, None]}
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_json(path)
    with pytest.raises(UserError, match=r"is .* a run"):
        read_json(tmp_path / "none.json")


def test_tensor_files(tmp_path):
    path = tmp_path / "m.safetensors"
    save_tensors(path, "amtl-thing", 1, {"a": torch.arange(6).view(2, 3).T}, {"k": 1})
    tensors, meta = load_tensors(path, "amtl-thing", 1)
    assert torch.equal(tensors["a"], torch.arange(6).view(2, 3).T)
    assert meta == {"k": 1}
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="damaged"):
        load_tensors(path, "amtl-thing", 1)
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an amtl-other"):
        load_tensors(path, "amtl-other", 1)
    save_tensors(path, "amtl-thing", 2, {}, {})
    with pytest.raises(UserError, match="upgrade"):
        load_tensors(path, "amtl-thing", 1)
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="damaged"):
        load_tensors(path, "amtl-thing", 1)
    with pytest.raises(UserError, match="there is no file"):
        load_tensors(tmp_path / "none", "amtl-thing", 1)
