"""Tables in their principal components: less is lost of trained rows that are cut off."""

from __future__ import annotations

import copy
from functools import partial

import amtl
import pytest
import torch
import torch.nn.functional as F
from amtl import AMTLEmbedding, AMTLEmbeddingCollection
from amtl.layer.basis import multiply, principal_basis
from amtl.store.packed import PackedFileError
from amtl.store.tensors import document_writer, read_document, read_tensors
from torch import nn

from amtl_kernels import optim

N, D, RANK = 3000, 16, 3
COUNTS = 9000 // torch.arange(1, N + 1)


def trained(seed=0, noise=0.02):
    """A table of three components, none of which is a column, and some noise."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(N, RANK, generator=draw) @ torch.randn(RANK, D, generator=draw)
    return mixed + noise * torch.randn(N, D, generator=draw)


class Model(nn.Module):
    def __init__(self, padding_idx=None):
        super().__init__()
        self.item = nn.Embedding(N, D, padding_idx=padding_idx)
        self.tags = nn.EmbeddingBag(N, D, mode="mean", padding_idx=padding_idx)
        self.few = nn.Embedding(40, D)
        with torch.no_grad():
            self.item.weight.copy_(trained(0))
            self.tags.weight.copy_(trained(1))
            if padding_idx is not None:
                self.item.weight[padding_idx] = self.tags.weight[padding_idx] = 0

    def forward(self, items, offsets):
        rows = self.item(items[: len(offsets)])
        return torch.cat([rows, self.tags(items, offsets), self.few(items[: len(offsets)] % 40)], 1)


COUNTS_OF = {"item": COUNTS, "tags": COUNTS, "few": COUNTS[:40]}


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(N // 10, (64,), generator=draw), torch.arange(0, 64, 4)


def error(model, plain, given):
    """Of the two large tables."""
    with torch.no_grad():
        found, expected = (each(*given)[:, : 2 * D] for each in (model, plain))
        return float((found - expected).norm() / expected.norm())


def test_components_are_those_that_keep_most():
    weight, counts = trained(noise=0.0), COUNTS
    basis, inverse = principal_basis(weight, counts)
    assert torch.allclose(basis @ inverse, torch.eye(D).double(), atol=1e-9)
    stored = weight.double() @ inverse
    assert torch.allclose(stored[:, :RANK] @ basis[:RANK], weight.double(), atol=1e-4)
    squares = (stored.square() * counts[:, None]).sum(0)
    assert torch.allclose(squares[:RANK], squares[:1].expand(RANK), rtol=1e-3)
    # By the definition: the singular vectors of the rows, each by the root of its count.
    _, _, vectors = torch.linalg.svd(weight.double() * counts[:, None].sqrt(), full_matrices=False)
    for ours, theirs in zip(basis[:RANK], vectors, strict=False):
        assert abs(float(F.cosine_similarity(ours, theirs, 0))) > 0.9999
    # Rows that count more pull the first component towards them.
    assert not torch.allclose(principal_basis(weight, counts.flip(0))[0], basis)
    same, _ = principal_basis(torch.zeros(5, D), torch.ones(5))
    assert torch.equal(same, torch.eye(D).double())
    alike = principal_basis(weight, torch.zeros(N))[0]
    assert torch.equal(alike, principal_basis(weight, torch.ones(N))[0])
    chunked = weight.repeat(30, 1)
    multiply(chunked, inverse)
    assert torch.allclose(chunked[-N:, :RANK], stored[:, :RANK].float(), atol=1e-4)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("bits", ["auto", 4, None])
def test_a_trained_model_is_cut_off_where_little_is(bits, padding_idx, tmp_path):
    plain, budget = Model(padding_idx), 0.06 if bits == 4 else 0.12
    given = batch()
    model = amtl.convert(
        copy.deepcopy(plain), COUNTS_OF, budget=budget, bits=bits, basis="principal"
    )
    assert model.item.basis is not None and model.few.basis is None
    amtl.freeze(model.eval())
    assert model.item.options.bits == {"auto": 8}.get(bits, bits)
    assert model.few.options.bits == {"auto": 4}.get(bits, bits)
    dense = sum(m.weight.nbytes for m in (plain.item, plain.tags, plain.few))
    taken = sum(layer.stored_bytes() for layer in amtl.layers(model).values())
    # Of 4 bytes a row where ids are in no order of counts, which these are in.
    assert 0.8 * budget * dense < taken <= budget * dense
    cut = amtl.convert(copy.deepcopy(plain), COUNTS_OF, budget=budget, bits=bits)
    amtl.freeze(cut.eval())
    lost, otherwise = error(model, plain, given), error(cut, plain, given)
    assert lost < {"auto": 0.03, 4: 0.2, None: 0.3}[bits] and lost < 0.6 * otherwise
    if padding_idx is not None:
        assert not model.item(torch.tensor([padding_idx])).any()
    # The weight, to read, is what lookups show.
    rows = torch.arange(N)
    assert torch.equal(model.item.weight[rows[:9]], model.item(rows[:9]))
    h = torch.randn(5, D)
    with torch.no_grad():
        assert torch.allclose(h @ model.item.weight.T, h @ model.item(rows).T, atol=1e-4)
    assert torch.allclose(model.item.dense_weight(), model.item(rows), atol=1e-6)
    shown = model(*given)
    amtl.save(model, tmp_path / "m.safetensors")
    assert read_tensors(tmp_path / "m.safetensors")[1]["version"] == "4"
    again = amtl.load(tmp_path / "m.safetensors", Model(padding_idx)).eval()
    assert torch.allclose(again(*given), shown, atol=1e-6)
    fresh = amtl.convert(Model(padding_idx), COUNTS_OF, budget=budget, bits=bits, basis="principal")
    amtl.freeze(fresh).load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(*given), shown)
    tensors, _, _, content = read_document(tmp_path / "m.safetensors", {"amtl-packed": 4})
    odd = {"layers/item/basis": torch.ones(D, D - 1)}
    document_writer("amtl-packed", 4, {**tensors, **odd}, content)(tmp_path / "odd")
    with pytest.raises(PackedFileError):
        amtl.load(tmp_path / "odd", Model(padding_idx))
    reverted = amtl.revert(model)
    assert type(reverted.item) is nn.Embedding
    assert torch.allclose(reverted(*given), shown, atol=1e-6)


def test_lookups_without_masks_are_what_they_were():
    plain = Model(2)
    model = copy.deepcopy(plain)
    amtl.convert(model, COUNTS_OF, budget=1.0, bits=None)
    for name in ("item", "tags"):
        assert getattr(model, name).to_principal_basis() is getattr(model, name)
    items, offsets = batch()
    assert torch.allclose(model(items, offsets), plain(items, offsets), atol=1e-4)
    sums = plain.tags.weight.detach(), copy.deepcopy(model.tags)
    sums[1].mode = "sum"
    weights = torch.rand(len(items))
    expected = F.embedding_bag(items, sums[0], offsets, mode="sum", per_sample_weights=weights)
    found = sums[1](items, offsets, per_sample_weights=weights)
    assert torch.allclose(found, expected, atol=1e-4)
    whole = amtl.revert(copy.deepcopy(model), masked=False)
    assert torch.allclose(whole.item.weight, plain.item.weight, atol=1e-4)
    amtl.freeze(model.eval())
    assert torch.allclose(model(items, offsets), plain(items, offsets), atol=1e-4)


def test_optimizers_know_of_rows_what_they_knew():
    plain = Model()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-4, betas=(0.0, 0.0))
    items, offsets = batch()

    def gradient(model):
        optimizer.zero_grad()
        model(items, offsets).square().sum().backward()

    gradient(plain)
    optimizer.step()
    amtl.convert(plain, COUNTS_OF, budget=0.3, bits=8, basis="principal")
    assert plain.item.basis is None, "8 bits of a budget that holds all numbers"
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 0.0))
    gradient(model)
    optimizer.step()
    amtl.convert(model, COUNTS_OF, budget=1.0, bits=None)
    model.item.to_principal_basis()
    kept = optimizer.state[model.item.weight]
    gradient(model)
    assert torch.allclose(kept["exp_avg"], model.item.weight.grad, atol=1e-3, rtol=1e-3)
    assert bool((kept["exp_avg_sq"] >= 0).all())
    amtl.revert(model, masked=False)
    gradient(model)
    back = optimizer.state[model.item.weight]["exp_avg"]
    assert torch.allclose(back, model.item.weight.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_it_trains_on(fused):
    model = Model()
    tables = {"fused_optimizer": partial(optim.RowwiseAdagrad, lr=0.1)} if fused else {}
    amtl.convert(model, COUNTS_OF, budget=0.12, basis="principal", **tables)
    amtl.freeze(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    fuses = [layer.fused_optimizer for layer in amtl.layers(model).values() if fused]
    losses = []
    for _ in range(60):
        loss = (model(*batch(3)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for each in {id(o): o for o in (optimizer, *fuses)}.values():
            each.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    before = model.eval()(*batch(3)).detach()
    counts = torch.cat([COUNTS, torch.full((50,), 30)])
    amtl.grow(model, {"item": counts})
    assert model.item.num_embeddings == N + 50
    close = (model(*batch(3)) - before).abs()[:, :D].mean()
    assert close < 0.2 * before[:, :D].abs().mean()


def test_gradients_are_those_of_the_rows_shown():
    layer = AMTLEmbedding(N, D, _weight=trained(), counts=COUNTS, budget=0.5, bits=None)
    layer.to_principal_basis().freeze()
    rows = torch.tensor([0, 5, 5, 900])
    upstream = torch.randn(4, D)
    layer(rows).backward(upstream)
    inner = upstream @ layer.basis.T
    place = int(layer._frozen_rows(torch.tensor([5])))
    block, start = layer.blocks[0], 0
    for block, end in zip(layer.blocks, layer.tier_ends, strict=True):  # noqa: B007
        if place < end:
            break
        start = end
    width = int(layer.row_dims()[5])
    expected = (inner[1] + inner[2])[:width]
    assert torch.allclose(block.grad[place - start, :width], expected, atol=1e-5)


def test_a_plain_state_is_read_into_it():
    model = amtl.convert(Model(), COUNTS_OF, budget=1.0, bits=None)
    model.item.to_principal_basis()
    other = trained(7)
    model.item.load_state_dict({"weight": other}, strict=False)
    assert torch.allclose(model.item(torch.arange(50)), other[:50], atol=1e-4)
    # A layer without a basis takes one from a state, and gives its own up for one without.
    without = amtl.convert(Model(), COUNTS_OF, budget=1.0, bits=None)
    state = without.item.state_dict()
    model.item.load_state_dict(state)
    assert model.item.basis is None
    assert torch.equal(model.item(torch.arange(50)), without.item(torch.arange(50)))


def test_it_is_exported():
    model = amtl.convert(Model(), COUNTS_OF, budget=0.12, basis="principal")
    amtl.freeze(model.eval())
    given = batch()
    program = torch.export.export(model, given)
    assert torch.allclose(program.module()(*given), model(*given), atol=1e-6)


def test_tables_that_have_no_use_of_it_stay():
    # All numbers fit.
    model = amtl.convert(Model(), COUNTS_OF, budget=0.3, basis="principal")
    assert all(layer.basis is None for layer in amtl.layers(model).values())
    with pytest.raises(ValueError, match="basis must be 'principal' or None, got 'pca'"):
        amtl.convert(Model(), COUNTS_OF, budget=0.3, basis="pca")


def test_what_cannot_be_turned():
    model = amtl.convert(Model(), COUNTS_OF, budget=0.12, basis="principal")
    with pytest.raises(RuntimeError, match="'item' has a basis already"):
        model.item.to_principal_basis()
    model.tags.freeze()
    with pytest.raises(RuntimeError, match="before freeze"):
        model.tags.to_principal_basis()
    tables = AMTLEmbeddingCollection({"a": N}, D, counts={"a": COUNTS}, budget=0.5)
    with pytest.raises(RuntimeError, match="is a collection"):
        tables.to_principal_basis()
    scaled = AMTLEmbedding(N, D, counts=COUNTS, budget=0.5, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm"):
        scaled.to_principal_basis()
    broken = nn.Embedding(N, D)
    broken.weight.data[7, 1] = float("nan")
    both = nn.ModuleDict({"good": nn.Embedding(N, D), "item": broken})
    before = both["good"].weight.clone()
    with pytest.raises(ValueError, match="'item': numbers that are not finite"):
        amtl.convert(both, {"good": COUNTS, "item": COUNTS}, budget=0.12, basis="principal")
    assert type(both["good"]) is nn.Embedding and torch.equal(both["good"].weight, before)
