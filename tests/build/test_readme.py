"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import amtl
import pytest
import torch
from torch import nn

import amtl_kernels

README = Path(__file__).resolve().parents[2] / "README.md"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(500, 32)
        self.user = nn.EmbeddingBag(300, 32, mode="sum")
        self.head = nn.Linear(64, 1)

    def forward(self, items: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.item(items), self.user(users)], 1))[:, 0]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = blocks()
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    items = (500 * torch.rand(40, 64) ** 3).long()
    users = (300 * torch.rand(40, 64, 2) ** 3).long()
    labels = (items % 2 == 0).float()
    model = Model()
    dense = sum(p.nbytes for p in (model.item.weight, model.user.weight))
    names = {
        "torch": torch,
        "model": model,
        "item_counts": torch.bincount(items.flatten(), minlength=500),
        "user_counts": torch.bincount(users.flatten(), minlength=300),
        "steps": 40,
        "inputs": lambda step: (items[step], users[step]),
        "labels": lambda step: labels[step],
        "loss_fn": nn.functional.binary_cross_entropy_with_logits,
    }
    exec(code, names)
    assert names["loss"].item() < 0.75
    layers = (model.item, model.user)
    assert all(layer.phase == "frozen" for layer in layers)
    assert sum(layer.stored_bytes() for layer in layers) <= 0.125 * dense + 4 * 800

    fresh = amtl.load(tmp_path / "model.safetensors", Model()).eval()
    assert not model.training
    torch.testing.assert_close(fresh(items[0], users[0]), model(items[0], users[0]), rtol=0, atol=0)


def test_the_optimizer_of_tables() -> None:
    _, code = blocks()
    torch.manual_seed(0)
    items, users = torch.randint(0, 500, (256,)), torch.randint(0, 300, (256, 2))
    labels = (items % 2 == 0).float()
    model = Model()
    counts = {
        "item": torch.bincount(items, minlength=500),
        "user": torch.bincount(users.flatten(), minlength=300),
    }
    names = {"partial": partial, "amtl": amtl, "amtl_kernels": amtl_kernels}
    exec(code, names | {"model": model, "counts": counts})
    amtl.freeze(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.binary_cross_entropy_with_logits(model(items, users), labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert isinstance(model.item.fused_optimizer, amtl_kernels.optim.Adagrad)
    assert losses[-1] < 0.5 * losses[0]
