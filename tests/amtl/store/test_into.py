"""Files that fill models: what a model keeps beside its embeddings goes on to work."""

from __future__ import annotations

import amtl
import pytest
import torch
from amtl.store import packed, tensors
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

ROWS = 50
INDICES = torch.arange(ROWS)


class Model(nn.Module):
    """Keeps its embedding in a dict, too, and has put a hook and an attribute on it."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ROWS, 8)
        self.item.tag = "item"
        self.item.register_forward_hook(lambda module, inputs, out: F.normalize(out, dim=-1))
        self.columns = {"item": self.item}
        self.top = nn.Linear(8, 1)

    def forward(self, rows):
        return self.top(self.columns["item"](rows))


def file_of(tmp_path, model, **options):
    amtl.convert(model, {"item": torch.arange(ROWS)}, budget=0.5, **options)
    amtl.freeze(model)
    model.eval()
    path = tmp_path / "model.safetensors"
    amtl.save(model, path)
    return path


@pytest.mark.parametrize("convert_first", [False, True])
def test_references_hooks_and_attributes_are_followed(tmp_path, convert_first):
    saved = Model()
    path = file_of(tmp_path, saved)
    other = Model()
    if convert_first:
        amtl.convert(other, {"item": torch.arange(ROWS)}, budget=0.5)
    amtl.load(path, other).eval()
    assert other.columns["item"] is other.item
    assert other.item.tag == "item"
    assert torch.equal(other(INDICES), saved(INDICES))
    torch.testing.assert_close(other.item(INDICES).norm(dim=1), torch.ones(ROWS))


def test_a_large_file_is_checked_all_the_same(tmp_path, monkeypatch):
    path = file_of(tmp_path, Model())
    want = amtl.load(path, Model()).eval()(INDICES)
    monkeypatch.setattr(tensors, "_CHECKED_AT_ONCE", 0)
    model = amtl.load(path, Model()).eval()
    assert torch.equal(model(INDICES), want)
    assert not model.item._forward_pre_hooks, "later calls cost nothing"
    content = bytearray(path.read_bytes())
    blocks = model.item.table_parameters()[0].detach().numpy().tobytes()
    content[content.index(blocks)] ^= 1
    path.write_bytes(content)
    with pytest.raises(amtl.TensorFileError, match="checksum"):
        amtl.load(path, Model()).eval()(INDICES)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize(
    ("of_file", "of_model"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_tables_take_the_type_of_the_model(tmp_path, of_file, of_model, bits):
    saved = Model().to(of_file)
    path = file_of(tmp_path, saved, bits=bits)
    model = amtl.load(path, Model().to(of_model)).eval()
    assert model(INDICES).dtype == of_model
    torch.testing.assert_close(model(INDICES).float(), saved(INDICES).float(), rtol=0, atol=0.02)


def test_a_model_on_the_meta_device_is_filled(tmp_path):
    saved = Model()
    path = file_of(tmp_path, saved)
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="'item' is on the meta device"):
        amtl.convert(model, {"item": torch.arange(ROWS, device="cpu")})
    amtl.load(path, model).eval()
    assert torch.equal(model(INDICES), saved(INDICES))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bits", ["auto", None])
def test_the_state_of_a_loaded_model_goes_into_a_converted_one(tmp_path, frozen, bits):
    """It says nothing of the search, of which the layer keeps what it knows."""
    loaded = amtl.load(file_of(tmp_path, Model(), bits=bits), Model()).eval()
    model = amtl.convert(Model(), {"item": torch.arange(ROWS)}, budget=0.5, bits=bits)
    if frozen:
        amtl.freeze(model)
    counts = model.item.head.group_counts.clone()
    model.load_state_dict(loaded.state_dict())
    model.eval()
    assert torch.equal(model(INDICES), loaded(INDICES))
    assert torch.equal(model.item.head.group_counts, counts)


def test_averaged_models_are_saved_and_filled_by_their_own_names(tmp_path):
    path = file_of(tmp_path, Model())
    averaged = AveragedModel(amtl.load(path, Model())).eval()
    averaged.update_parameters(amtl.load(path, Model()))
    saved = tmp_path / "averaged.safetensors"
    amtl.save(averaged, saved)
    want = averaged(INDICES)
    assert torch.equal(amtl.load(saved, Model()).eval()(INDICES), want)
    assert torch.equal(amtl.load(saved, AveragedModel(Model())).eval()(INDICES), want)
    assert sorted(amtl.load(saved).layers) == ["item"]


def test_a_file_of_an_averaged_model_as_it_was_opens_in_one(tmp_path, monkeypatch):
    averaged = AveragedModel(amtl.load(file_of(tmp_path, Model()), Model())).eval()
    path = tmp_path / "before.safetensors"
    with monkeypatch.context() as before:
        before.setattr(packed, "_averaged", packed.unwrapped)
        amtl.save(averaged, path)
    other = amtl.load(path, AveragedModel(Model())).eval()
    assert torch.equal(other(INDICES), averaged(INDICES))


@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_torch_save_are_told_from_damaged_ones(tmp_path, zipped):
    path = tmp_path / "model.pt"
    torch.save(Model().state_dict(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(amtl.PackedFileError, match=r"torch\.save.*load_state_dict"):
        amtl.load(path, Model())
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(amtl.TensorFileError, match="damaged"):
        amtl.load(path)


def test_a_model_with_fewer_tables_is_told_where_the_others_are(tmp_path):
    both = nn.ModuleDict({"user": nn.Embedding(ROWS, 8), "item": nn.Embedding(ROWS, 8)})
    amtl.convert(both, {"user": INDICES, "item": INDICES}, budget=0.5)
    path = tmp_path / "both.safetensors"
    amtl.save(amtl.freeze(both).eval(), path)
    with pytest.raises(amtl.PackedFileError, match=r"\['user'\].*without a model.*\.layers"):
        amtl.load(path, nn.ModuleDict({"item": nn.Embedding(ROWS, 8)}))
    item = amtl.load(path).layers["item"].eval()
    assert torch.equal(item(INDICES), both["item"](INDICES))
