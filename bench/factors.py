"""The ten lines where scores are dot products: factorised ratings, BPR, sequences of items.

    python -m bench.factors OUT.jsonl --seeds 41,42,43

Users and items have planted factors and Zipf-distributed activity, ids are in no order, and rows
are all there is to learn: a rounded number goes into the score as it is, with no MLP behind it to
make up for it. The plain model and the same one converted, trained alike, each scored on the test
split by its best epoch on validation; and the plain one converted when it is trained.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import amtl
import torch
from amtl.paper.records import Claim, append, read
from torch import Tensor, nn

from bench.dropin import USUAL, Training
from bench.sequences import Sequences

BUDGETS = (0.3, 0.125, 0.03)
TASKS = ("ratings", "retrieval", "sequences")
USERS, ITEMS, FACTORS, DIM = 3000, 1500, 8, 16
SAMPLES, EPOCHS, BATCH, RATE, TOP = 150_000, 12, 512, 3e-3, 20


class Factors(nn.Module):
    """Users and items with factors and biases."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, DIM), nn.Embedding(items, DIM)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores `[B]`."""
        dots = (self.user(users) * self.item(items)).sum(1)
        return dots + self.user_bias(users)[:, 0] + self.item_bias(items)[:, 0]


class Data:
    """Pairs of users and items, what they rated, and the three splits."""

    batch = BATCH

    def __init__(self, task: str, seed: int, samples: int) -> None:
        self.task, self.sign = task, -1 if task == "ratings" else 1
        self.generator = g = torch.Generator().manual_seed(seed)
        activity = [self._zipf(n, a) for n, a in ((USERS, 0.8), (ITEMS, 1.0))]
        own, theirs = (torch.randn(n, FACTORS, generator=g) for n in (USERS, ITEMS))
        self.users = activity[0].multinomial(samples, True, generator=g)
        taste = own @ theirs.T / FACTORS**0.5
        chances = (activity[1].log() + 1.5 * taste).softmax(1)
        self.items = chances[self.users].multinomial(1, generator=g)[:, 0]
        bias = [0.5 * torch.randn(n, generator=g) for n in (USERS, ITEMS)]
        noise = 0.5 * torch.randn(samples, generator=g)
        self.ratings = taste[self.users, self.items] + noise
        self.ratings += bias[0][self.users] + bias[1][self.items]
        ends = [samples * tenths // 10 for tenths in (0, 8, 9, 10)]
        self.parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self.rows = torch.arange(samples)[self.parts[0]]

    def _zipf(self, rows: int, exponent: float) -> Tensor:
        shares = torch.arange(1, rows + 1).pow(-exponent)
        return shares[torch.randperm(rows, generator=self.generator)]

    def model(self) -> Factors:
        """Untrained."""
        return Factors(USERS, ITEMS)

    def counts(self) -> dict[str, Tensor]:
        """Of the training split, by table."""
        train = self.parts[0]
        users = torch.bincount(self.users[train], minlength=USERS)
        items = torch.bincount(self.items[train], minlength=ITEMS)
        return {"user": users, "user_bias": users, "item": items, "item_bias": items}

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Of some samples: squared error, or of a random item that is scored as high (BPR)."""
        scores = model(self.users[rows], self.items[rows])
        if self.task == "ratings":
            return (scores - self.ratings[rows]).square().mean()
        others = torch.randint(ITEMS, rows.shape, generator=self.generator)
        gaps: Tensor = scores - model(self.users[rows], others)
        return -nn.functional.logsigmoid(gaps).mean()

    @torch.no_grad()
    def metric(self, model: Any, part: int) -> float:
        """RMSE, less of which is better, or recall among the best of what a user has not seen."""
        rows = self.parts[part]
        users, items = self.users[rows], self.items[rows]
        if self.task == "ratings":
            return float((model(users, items) - self.ratings[rows]).square().mean().sqrt())
        everyone, every = torch.arange(USERS), torch.arange(ITEMS)
        scores = model.user(everyone) @ model.item(every).T + model.item_bias(every)[:, 0]
        train = self.parts[0]
        seen = torch.zeros(USERS, ITEMS, dtype=torch.bool)
        seen[self.users[train], self.items[train]] = True
        top = torch.zeros_like(seen).scatter_(1, scores.masked_fill(seen, -1e9).topk(TOP)[1], True)
        return float(top[users, items][~seen[users, items]].float().mean())


def train(
    data: Data | Sequences,
    model: nn.Module,
    epochs: int,
    seed: int,
    training: Training = USUAL,
) -> float:
    """The test metric of the best epoch on validation, to which the model goes back."""
    data.generator.manual_seed(seed)
    optimizers = training.optimizers(model, RATE)
    best: tuple[float, dict[str, Any]] | None = None
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(data.rows), generator=data.generator)
        for batch in data.rows[order].split(training.batch or data.batch):
            for optimizer in optimizers:
                optimizer.zero_grad()
            data.loss(model, batch).backward()
            for optimizer in optimizers:
                optimizer.step()
        score = data.sign * data.metric(model.eval(), 1)
        if best is None or score > best[0]:
            best = score, copy.deepcopy(model.state_dict())
    assert best is not None
    model.load_state_dict(best[1])
    return data.metric(model.eval(), 2)


def file_bytes(model: nn.Module) -> int:
    """Of the packed file, all of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        amtl.save(model, path)
        return os.path.getsize(path)


def models(
    task: str, seed: int, samples: int, epochs: int, training: Training
) -> Iterator[dict[str, Any]]:
    """The plain model of a seed, and those converted before and after training."""
    data = Sequences(seed, samples) if task == "sequences" else Data(task, seed, samples)
    torch.manual_seed(seed)
    plain = data.model()
    initial = copy.deepcopy(plain)
    full = sum(p.nbytes for p in plain.parameters())
    score = train(data, plain, epochs, seed, training)
    yield {"kind": "plain", "budget": 1.0, "score": score, "share": 1.0}
    for budget in BUDGETS:
        for kind, source in (("converted", initial), ("compressed", plain)):
            model = amtl.convert(copy.deepcopy(source), data.counts(), budget)
            amtl.freeze(model)
            model.eval()
            if kind == "converted":
                score = train(data, model, epochs, seed, training)
            else:
                score = data.metric(model, 2)
            share = file_bytes(model) / full
            yield {"kind": kind, "budget": budget, "score": score, "share": share}


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: the plain score, and differences to it, paired by seed, with the file's share."""
    found: dict[tuple[str, str, float], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for record in records:
        job = record["job"]
        how = (f"{name} {value}" for name, value in Training.of(job).unusual().items())
        task, seed = ", ".join((job["task"], *how)), job["seed"]
        for model in record["models"]:
            found[task, model["kind"], model["budget"]][seed] = model
    lines = [
        "| task | model | score, mean (each seed less the plain one's) | file |",
        "|---|---|---|---|",
    ]
    for (task, kind, budget), by_seed in found.items():
        plain = found[task, "plain", 1.0]
        mean = statistics.fmean(model["score"] for model in by_seed.values())
        share = statistics.fmean(model["share"] for model in by_seed.values())
        gaps = [r["score"] - plain[s]["score"] for s, r in sorted(by_seed.items())]
        each = "" if kind == "plain" else " (" + ", ".join(f"{gap:+.4f}" for gap in gaps) + ")"
        name = kind if kind == "plain" else f"{kind}, {100 * budget:g} %"
        lines.append(f"| {task} | {name} | {mean:.4f}{each} | {100 * share:.1f} % |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="dot products: plain against converted")
    parser.add_argument(
        "out", type=Path, help="a seed is a line, appended when it ends; those there stay"
    )
    parser.add_argument("--seeds", default="41,42,43")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    Training.add_to(parser, "of all models")
    given = parser.parse_args(arguments)
    training = Training.given(given)
    torch.set_num_threads(1)
    for task in given.tasks.split(","):
        for seed in map(int, given.seeds.split(",")):
            of_run = (task, seed, given.samples, given.epochs)
            job = dict(zip(("task", "seed", "samples", "epochs"), of_run, strict=True))
            job |= training.unusual()
            with Claim(given.out, job) as mine:
                if mine:
                    found = []
                    for model in models(*of_run, training):
                        found.append(model)
                        print(job, model, flush=True)
                    append(given.out, {"job": job, "models": found})
    print("\n".join(table(list(read(given.out)))))


if __name__ == "__main__":
    main()
