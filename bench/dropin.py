"""The README's ten lines on real data: plain PyTorch, a table a field, Adam, early stopping.

Nothing of `amtl train` is in it but the reading of data: no race, no teacher, no field weights.
What `amtl.convert` brings, and nothing else, is what differs from the plain model; both may have
their tables trained by the optimizer that `amtl train` has for them.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import amtl
import torch
from amtl.data.encoded import EncodedData
from amtl.run import methods
from amtl.run.config import TABLE_RATES
from amtl.run.learner import Task
from amtl.run.metrics import auc, log_loss
from torch import Tensor, nn

BATCH, RATE, EPOCHS, PATIENCE = 2048, 1e-3, 30, 4
"""Samples a step, Adam's learning rate, epochs at most, validations without a better one; two an
epoch."""


class Training(NamedTuple):
    """How tables are trained; all else is by Adam.

    Attributes:
        adagrad: by `amtl_kernels.optim.Adagrad`, as `amtl train` does its own.
        rate: their learning rate; None for that of all else, or of `amtl train` by Adagrad.
        decay: their weight decay.
        batch: samples a step; None for the usual number.
    """

    adagrad: bool = False
    rate: float | None = None
    decay: float = 0.0
    batch: int | None = None

    @staticmethod
    def add_to(parser: argparse.ArgumentParser, of: str) -> None:
        """Options for the fields; `of` says of which models."""
        parser.add_argument("--adagrad", action="store_true", help=f"tables {of}: by Adagrad")
        parser.add_argument("--rate", type=float, help=f"learning rate of tables {of}")
        parser.add_argument("--decay", type=float, default=0.0, help=f"of tables {of}")
        parser.add_argument("--batch", type=int, help="samples a step")

    @classmethod
    def given(cls, arguments: argparse.Namespace) -> Training:
        """What the options say."""
        return cls(**{name: getattr(arguments, name) for name in cls._fields})

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Training:
        """What a job says of it."""
        return cls(**{name: job[name] for name in cls._fields if name in job})

    def unusual(self) -> dict[str, Any]:
        """The fields that are not as usual: what a job says of it."""
        usual = type(self)()._asdict()
        return {name: value for name, value in self._asdict().items() if value != usual[name]}

    def optimizers(self, model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
        """Of the model's tables and of all else, plain or converted.

        Args:
            model: its tables are layers of this project, or PyTorch's.
            rate: of all else.
        """
        plain = (nn.Embedding, nn.EmbeddingBag)
        tables = [module.weight for module in model.modules() if isinstance(module, plain)]
        tables += amtl.table_parameters(model)
        theirs = {id(parameter) for parameter in tables}
        rest = [p for p in model.parameters() if id(p) not in theirs]
        if self.adagrad:
            of_tables = self.rate or TABLE_RATES["adagrad"]
            found = [methods.table_optimizer("adagrad", tables, of_tables, self.decay)]
            return [*found, torch.optim.Adam(rest, lr=rate)] if rest else found
        groups = [{"params": tables, "weight_decay": self.decay, "lr": self.rate or rate}]
        return [torch.optim.Adam([*groups, {"params": rest}], lr=rate)]


USUAL = Training()


class ClickModel(nn.Module):
    """An embedding for each field and an MLP, as people write it.

    Args:
        task: the data, for the fields and their numbers of values.
        dim: width of the tables.
        std: of their first numbers; `nn.Embedding` has 1.
    """

    def __init__(self, task: Task, dim: int, std: float = 0.01) -> None:
        super().__init__()
        encoder = task.encoder
        sizes = encoder.field_sizes
        bags = [field.kind == "bag" for field in encoder.fields]
        self.fields = nn.ModuleList(
            nn.EmbeddingBag(rows, dim, mode="mean") if bag else nn.Embedding(rows, dim)
            for rows, bag in zip(sizes, bags, strict=True)
        )
        for field in self.fields:
            nn.init.normal_(field.weight, std=std)
        self.starts = [sum(sizes[:f]) for f in range(len(sizes))]
        width = len(sizes) * dim + encoder.num_dense
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)),
        )

    def forward(self, data: EncodedData, samples: Tensor) -> Tensor:
        """Logits `[B]` of samples."""
        rows = data.rows[samples].long()
        singles = rows.shape[1]
        parts = [self.fields[f](rows[:, f] - self.starts[f]) for f in range(singles)]
        for f, bag in enumerate(data.bags, singles):
            codes = bag.codes[samples]
            first, length = bag.offsets[codes], bag.offsets[codes + 1] - bag.offsets[codes]
            offsets = length.cumsum(0) - length
            within = torch.arange(int(length.sum())) - offsets.repeat_interleave(length)
            values = bag.values[first.repeat_interleave(length) + within].long()
            parts.append(self.fields[f](values - self.starts[f], offsets))
        logits: Tensor = self.mlp(torch.cat([*parts, data.dense[samples]], 1))
        return logits.squeeze(1)


@torch.no_grad()
def scores(model: ClickModel, data: EncodedData) -> tuple[float, float]:
    """AUC and log loss."""
    model.eval()
    logits = torch.cat([model(data, part) for part in torch.arange(len(data)).split(8192)])
    return auc(logits, data.labels), log_loss(logits, data.labels)


def compress(
    model: ClickModel, task: Task, budget: float, bits: int | str | None, basis: str | None = None
) -> int:
    """Converts and freezes a model in place; returns the bytes of its tables."""
    names = [f"fields.{f}" for f in range(len(model.fields))]
    counts = dict(zip(names, task.encoder.counts().split(task.encoder.field_sizes), strict=True))
    amtl.convert(model, counts, budget, bits=bits, basis=basis)
    amtl.freeze(model)
    return sum(layer.stored_bytes() for layer in amtl.layers(model).values())


def train(
    task: Task,
    seed: int,
    dim: int,
    budget: float | None = None,
    bits: int | None = None,
    after: bool = False,
    training: Training = USUAL,
) -> dict[str, Any]:
    """Trains a model, converted if there is a budget; tests it as it was when it validated best.

    Args:
        task: encoded data.
        seed: of weights and batches.
        dim: width of the tables.
        budget: of all tables together; None for the plain model.
        bits: of a stored number; None for 32.
        after: convert the model when it is trained, and train it no further.
        training: of the tables.
    """
    torch.manual_seed(seed)
    started = time.process_time()
    model = ClickModel(task, dim)
    rows = sum(task.encoder.field_sizes)
    stored = dense = rows * dim * 4
    if budget is not None and not after:
        stored = compress(model, task, budget, bits)
    best = fit(model, task, seed, training)
    if budget is not None and after:
        stored = compress(model, task, budget, bits)
    test = scores(model, task.test)
    found = {"test_auc": test[0], "test_logloss": test[1]}
    found |= {"stored_bytes": stored, "dense_bytes": dense}
    return {"cpu": time.process_time() - started, **found, **best}


def fit(model: ClickModel, task: Task, seed: int, training: Training = USUAL) -> dict[str, Any]:
    """Trains a model, plain or converted, and leaves it as it was when it validated best.

    Args:
        model: with a table for each field.
        task: encoded data.
        seed: of batches.
        training: of the tables.

    Returns:
        Its scores in validation, and epochs.
    """
    optimizers = training.optimizers(model, RATE)
    batch = training.batch or BATCH
    steps = math.ceil(len(task.train) / batch)
    best: dict[str, Any] | None = None
    stale = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(
            len(task.train), generator=torch.Generator().manual_seed(seed * 1009 + epoch)
        )
        for step, samples in enumerate(order.split(batch)):
            model.train()
            loss = nn.functional.binary_cross_entropy_with_logits(
                model(task.train, samples), task.train.labels[samples]
            )
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            if (step + 1) * 2 // steps == step * 2 // steps:
                continue
            of_val = scores(model, task.val)
            stale += 1
            if best is None or of_val[0] - of_val[1] > best["val_auc"] - best["val_logloss"]:
                best = {"val_auc": of_val[0], "val_logloss": of_val[1]}
                best |= {"state": copy.deepcopy(model.state_dict())}
                best |= {"best_epoch": epoch + (step + 1) / steps}
                stale = 0
        if stale >= PATIENCE:
            break
    assert best is not None
    model.load_state_dict(best.pop("state"))
    return {**best, "epochs_run": epoch + 1}
