"""TorchRec's embedding bag collections on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders.base import AutogradSession, Contender, Session, refuse_copy
from bench.inputs import Case, Problem
from bench.oracle import Equations

INSTALL = (
    "pip install --no-deps fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0 torchmetrics==1.0.3 "
    "lightning-utilities tensordict pyvers tqdm pyre-extensions typing-inspect mypy-extensions "
    "packaging orjson cloudpickle"
)


def _configs(problem: Problem) -> list[Any]:
    from torchrec.modules.embedding_configs import EmbeddingBagConfig

    return [
        EmbeddingBagConfig(
            name=f"table{t}",
            embedding_dim=problem.case.dim,
            num_embeddings=problem.rows_per_table,
            feature_names=[f"feature{t}"],
        )
        for t in range(problem.case.tables)
    ]


def _features(problem: Problem) -> list[Any]:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    keys = [f"feature{t}" for t in range(problem.case.tables)]
    return [
        KeyedJaggedTensor(keys=keys, values=ids, offsets=problem.offsets) for ids in problem.ids
    ]


class _TorchRec(Contender):
    equations = Equations("all")
    install = INSTALL

    def absent(self) -> str:
        """Whether the package imports."""
        if importlib.util.find_spec("torchrec") is None:
            return "torchrec is not installed"
        try:
            import torchrec  # noqa: F401
        except Exception as error:
            return f"torchrec does not import here: {error}"
        return ""

    def refuses(self, case: Case) -> str:
        """Measured in float32, pooled."""
        if case.dtype != "float32":
            return "measured in float32 only"
        return "" if case.pooled else "pooled lookups only"


class Collection(_TorchRec):
    """``EmbeddingBagCollection``: one nn.EmbeddingBag a table behind a KeyedJaggedTensor."""

    name = "torchrec"
    title = "TorchRec EmbeddingBagCollection"

    def refuses(self, case: Case) -> str:
        """Its gradients are dense, so only lookups."""
        if case.work != "forward":
            return "its gradients are as large as the tables"
        return super().refuses(case)

    def prepare(self, problem: Problem) -> Session:
        """Puts the problem's weights into its modules."""
        from torchrec.modules.embedding_modules import EmbeddingBagCollection

        collection: Any = EmbeddingBagCollection(_configs(problem), device=torch.device("meta"))
        rows = problem.rows_per_table
        for t, bag in enumerate(collection.embedding_bags.values()):
            bag.weight = nn.Parameter(problem.weight[t * rows : (t + 1) * rows])
        collection._device = problem.weight.device
        features = _features(problem)

        def lookup(rotation: int) -> Tensor:
            values: Tensor = collection(features[rotation]).values()
            return values

        return AutogradSession(problem, lookup, [])


class Fused(_TorchRec):
    """``FusedEmbeddingBagCollection``: FBGEMM's TBE under TorchRec's interface."""

    name = "torchrec_fused"
    title = "TorchRec FusedEmbeddingBagCollection"

    def refuses(self, case: Case) -> str:
        """Its backward always updates; a table is not shared with the others."""
        if case.work == "backward":
            return "its backward always updates"
        if case.optimizer == "adam":
            return "compared with SGD and Adagrad only"
        return refuse_copy(case, "a copy") or super().refuses(case)

    def allocates(self, case: Case) -> dict[str, float]:
        """Its own tables."""
        size = case.tables * case.rows * case.dim * 4.0
        return {self.name: size, **super().allocates(case)}

    def prepare(self, problem: Problem) -> Session:
        """Copies the problem's weights; its update is fused into the backward."""
        import torchrec
        from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

        case = problem.case
        kind: Any = {
            "none": torch.optim.SGD,
            "sgd": torch.optim.SGD,
            "adagrad": torch.optim.Adagrad,
            "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
        }[case.optimizer]
        options: dict[str, float] = {"lr": problem.learning_rate}
        if case.optimizer.endswith("adagrad"):
            options["eps"] = problem.eps
        collection: Any = FusedEmbeddingBagCollection(
            tables=_configs(problem),
            optimizer_type=kind,
            optimizer_kwargs=options,
            device=problem.weight.device,
        )
        rows = problem.rows_per_table
        state = collection.state_dict()
        for t in range(case.tables):
            state[f"embedding_bags.table{t}.weight"].copy_(
                problem.weight[t * rows : (t + 1) * rows]
            )
        features = _features(problem)

        def lookup(rotation: int) -> Tensor:
            values: Tensor = collection(features[rotation]).values()
            return values

        return AutogradSession(problem, lookup, [], rows=_CollectionRows(state, rows, case))


class _CollectionRows:
    """Rows of a collection's own tables."""

    def __init__(self, state: dict[str, Tensor], rows: int, case: Case) -> None:
        self._tables = [state[f"embedding_bags.table{t}.weight"] for t in range(case.tables)]
        self._rows = rows

    def _parts(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = []
        for t, table in enumerate(self._tables):
            here = rows[(rows >= t * self._rows) & (rows < (t + 1) * self._rows)]
            parts.append((table.detach(), here - t * self._rows))
        return parts

    def read(self, rows: Tensor) -> Tensor:
        return torch.cat([table[local] for table, local in self._parts(rows)])

    def write(self, rows: Tensor, values: Tensor) -> None:
        start = 0
        for table, local in self._parts(rows):
            table.index_copy_(0, local, values[start : start + local.numel()])
            start += local.numel()


def contenders() -> Iterable[Contender]:
    """Those of this module."""
    return [Collection(), Fused()]
