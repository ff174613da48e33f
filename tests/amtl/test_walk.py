"""Random lives of a model beside a plain-PyTorch twin that is told sizes and nothing else.

Build, train, convert, search, freeze, train on, save, load, thaw, resume, in any order. AMTL_SOAK=1
walks for half an hour.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import amtl
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from amtl_kernels import optim

SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")
ROWS, DIM = 23, 8
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "decayed": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.3, decay_every=2),
}
# Ours for the model, applied by the backward; PyTorch's of the same equations for the twin.
FUSED = {
    "sgd, fused": lambda p: optim.SGD(p, lr=0.1),
    "adagrad, fused": lambda p: optim.Adagrad(p, lr=0.1),
}
FUSED["decayed, fused"] = OPTIMIZERS["decayed"]


class Model(nn.Module):
    def __init__(self, bag: bool, padding: int | None) -> None:
        super().__init__()
        self.table: nn.Module
        if bag:
            self.table = nn.EmbeddingBag(ROWS, DIM, mode="sum", padding_idx=padding)
        else:
            self.table = nn.Embedding(ROWS, DIM, padding_idx=padding)

    def forward(self, rows: Tensor) -> Tensor:
        return self.table(rows)


class Twin:
    """A dense weight [N, D], a mask of it and a row that stands in for each one."""

    def __init__(self, weight: Tensor, bag: bool, padding: int | None, optimizer: str) -> None:
        self.weight = nn.Parameter(weight.detach().clone())
        self.optimizer = OPTIMIZERS[optimizer.removesuffix(", fused")]([self.weight])
        self.bag, self.padding = bag, padding
        self.stands_in = torch.arange(ROWS)

    def forward(self, rows: Tensor, dims: Tensor) -> Tensor:
        vectors = (self.weight * kept(dims))[self.stands_in[rows]]
        if self.padding is not None:
            here = (rows == self.padding)[..., None]
            vectors = torch.where(here, 0.0 if self.bag else vectors.detach(), vectors)
        return vectors.sum(1) if self.bag else vectors

    def look(self, layer: nn.Module) -> None:
        """Which rows are looked up as another one."""
        self.stands_in = torch.arange(ROWS)
        if layer.shared_rows is not None:
            nothing = layer.row_dims() == 0
            nothing[layer.shared_rows] = False
            if self.padding is not None:
                nothing[self.padding] = False
            self.stands_in[nothing] = layer.shared_rows[-1]

    def freeze(self, dims: Tensor, stored: Tensor) -> None:
        """What sizes hide is lost; of the optimizer's state, magnitudes keep the stored width."""
        with torch.no_grad():
            self.weight *= kept(dims)
            for key, value in self.optimizer.state[self.weight].items():
                if isinstance(value, Tensor) and value.ndim == 2:
                    value *= kept(dims if key == "momentum_buffer" else stored)

    def thaw(self) -> None:
        """Rows that had no place start from the one that stood in for them."""
        with torch.no_grad():
            self.weight.copy_(self.weight[self.stands_in])


def kept(dims: Tensor) -> Tensor:
    return (torch.arange(DIM) < dims[:, None]).float()


class Walk(RuleBasedStateMachine):
    @initialize(
        bag=st.booleans(),
        padding=st.sampled_from([None, 0, 11]),
        optimizer=st.sampled_from([*OPTIMIZERS, *FUSED]),
        options=st.fixed_dictionaries(
            {
                "parametrization": st.sampled_from(["rule", "ordinal", "free"]),
                "budget": st.sampled_from([0.3, 0.4, 0.7]),
                "min_dim": st.integers(0, 1),
                "size_noise": st.just(0.0),
                "shared_rows": st.sampled_from([None, "rarest"]),
                "tier_width": st.sampled_from([None, 1, 2, 4]),
            }
        ),
        seed=st.integers(0, 99),
    )
    def build(self, bag, padding, optimizer, options, seed):
        torch.manual_seed(seed)
        if options["tier_width"] == 4:
            # Half of the table, if no row may keep nothing.
            options["min_dim"] = 0
        self.made, self.kind, self.options = (bag, padding), optimizer, options
        # An optimizer that was made for a frozen model gets the head beside the table at thaw().
        self.beside = False
        self.counts = torch.randint(1000, (ROWS,)) ** torch.randint(3, (ROWS,))
        self.model = Model(*self.made)
        self.twin = Twin(self.model.table.weight, bag, padding, optimizer)
        self.optimizer = (OPTIMIZERS | FUSED)[optimizer](self.model.parameters())

    def _convert(self, model, counts):
        with torch.no_grad():
            amtl.convert(model, {"table": counts}, **{"bits": None, **self.options})

    def _optimizer(self, model):
        groups = amtl.parameter_groups(model)
        if self.beside and self.phase == "search":
            groups = [{"params": list(model.parameters())}, {"params": []}]
        return (OPTIMIZERS | FUSED)[self.kind](groups)

    def _fuse(self, model, optimizer):
        if self.kind in FUSED:
            amtl.fuse(model, optimizer)

    @property
    def phase(self) -> str:
        return getattr(self.model.table, "phase", "plain")

    def dims(self) -> Tensor:
        if self.phase == "plain":
            return torch.full((ROWS,), DIM)
        return self.model.table.row_dims()

    @precondition(lambda self: self.phase == "plain")
    @rule()
    def convert(self):
        self._convert(self.model, self.counts)
        masks = amtl.mask_parameters(self.model)
        self.optimizer.add_param_group({"params": masks, "lr": 1e-2})
        self._fuse(self.model, self.optimizer)
        self.twin.look(self.model.table)

    @rule(seed=st.integers(0, 2**16))
    def train(self, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(ROWS, (7, 3), generator=generator)
        target = torch.randn(DIM, generator=generator)
        dims = self.dims()
        for forward, optimizer in (
            (self.model, self.optimizer),
            (lambda rows: self.twin.forward(rows, dims), self.twin.optimizer),
        ):
            optimizer.zero_grad()
            (forward(rows) - target).square().mean().backward()
            if self.kind in FUSED and self.phase != "plain" and optimizer is self.optimizer:
                assert all(p.grad is None for p in amtl.table_parameters(self.model))
            optimizer.step()
        if self.phase == "search":
            self.twin.look(self.model.table)

    @precondition(lambda self: self.phase == "search")
    @rule(told=st.booleans())
    def freeze(self, told):
        before = self.dims()
        with torch.no_grad():
            expected = self.model(self.every_row())
        amtl.freeze(self.model, self.optimizer if told else None)
        assert torch.equal(self.model(self.every_row()), expected)
        self.twin.freeze(before, self.dims())
        layer = self.model.table
        assert layer.stored_fraction() <= self.options["budget"] + 1e-9
        assert layer.stored_bytes() >= sum(p.nbytes for p in self.model.parameters())

    @precondition(lambda self: self.phase == "frozen")
    @rule(told=st.booleans())
    def thaw(self, told):
        self.model.table.thaw(self.optimizer if told else None)
        self.twin.thaw()

    @precondition(lambda self: self.phase != "plain")
    @rule(into_frozen=st.booleans(), optimizer_first=st.booleans())
    def resume(self, into_frozen, optimizer_first):
        """In a new process, as it were: counts are not known there, and come with the state."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        saved, optimizer_state = torch.load(file, weights_only=True)
        model = Model(*self.made)
        self._convert(model, torch.ones(ROWS))
        if optimizer_first:
            optimizer = self._optimizer(model)
            self._fuse(model, optimizer)
        if into_frozen:
            amtl.freeze(model)
        model.load_state_dict(saved)
        if not optimizer_first:
            optimizer = self._optimizer(model)
            self._fuse(model, optimizer)
        optimizer.load_state_dict(optimizer_state)
        if self.phase == "frozen":
            self.beside = not optimizer_first
        self.model, self.optimizer = model, optimizer

    @precondition(lambda self: self.phase == "frozen")
    @rule()
    def pack(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            amtl.save(self.model, path)
            model = Model(*self.made)
            amtl.load(path, model)
            assert torch.equal(model(self.every_row()), self.model(self.every_row()))

    def every_row(self) -> Tensor:
        return torch.arange(ROWS)[:, None]

    @invariant()
    def equals_its_twin(self):
        with torch.no_grad():
            mine, theirs = (
                self.model(self.every_row()),
                self.twin.forward(self.every_row(), self.dims()),
            )
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    @invariant()
    def the_optimizer_holds_what_there_is(self):
        held = sorted(id(p) for g in self.optimizer.param_groups for p in g["params"])
        assert held == sorted(id(p) for p in self.model.parameters())


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=1000 if SOAK else 16,
    stateful_step_count=40 if SOAK else 12,
    report_multiple_bugs=False,
    # Shrinking a walk takes minutes.
    phases=list(Phase) if SOAK else [Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
