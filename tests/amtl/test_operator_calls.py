"""A training step is one lookup and one update, however many tables, tiers and fields there are."""

from __future__ import annotations

from collections import Counter, OrderedDict
from functools import partial

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag, AMTLEmbeddingCollection
from amtl.data.registry import load_source
from amtl.integrations import deepctr, fuxictr
from amtl.layer.budget import fit_shift
from amtl.run.config import TrainConfig
from amtl.run.learner import Learner
from amtl.run.preparation import prepare
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from amtl_kernels.optim import Adam

FUSED = partial(Adam, lr=1e-2)
ONE_OF_EACH = {"lookup": 1, "lookup_update_": 1}


class Calls(TorchDispatchMode):
    """Counts calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "amtl":
            self.count[func._schema.name.removeprefix("amtl::")] += 1
        return func(*args, **(kwargs or {}))


class AllCalls(TorchDispatchMode):
    """Counts calls of any operator, and of those that are no views of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.working = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        self.working += not func.is_view
        return func(*args, **(kwargs or {}))


def counted(step) -> dict[str, int]:
    with Calls() as calls:
        step()
    # Sizes are solved by operators of their own, once per change.
    return {k: n for k, n in calls.count.items() if k.startswith(("lookup", "apply"))}


def counts_of(rows: int) -> torch.Tensor:
    return (1000 / torch.arange(1, rows + 1)).long()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
def test_a_layer_is_looked_up_and_updated_once(kind, bits, frozen):
    layer = kind(50, 16, counts=counts_of(50), budget=0.06, bits=bits, fused_optimizer=FUSED)
    if frozen:
        layer.freeze()
        assert len(layer.blocks) > 1
    inputs = (
        (torch.arange(6),) if kind is AMTLEmbedding else (torch.arange(6), torch.tensor([0, 3]))
    )

    def step():
        layer(*inputs).sum().backward()
        layer.fused_optimizer.step()

    assert counted(step) == ONE_OF_EACH


@pytest.mark.parametrize("frozen", [False, True])
def test_many_tables_are_looked_up_and_updated_once(frozen):
    names = [f"t{i}" for i in range(26)]
    tables = AMTLEmbeddingCollection(
        dict.fromkeys(names, 20),
        8,
        counts={name: counts_of(20) for name in names},
        budget=0.3,
        fused_optimizer=FUSED,
    )
    if frozen:
        tables.freeze()
    rows = torch.randint(0, 20, (5, 26))

    def step():
        tables(rows).sum().backward()
        tables.fused_optimizer.step()

    assert counted(step) == ONE_OF_EACH


@pytest.mark.parametrize("frozen", [False, True])
def test_categorical_features_of_fuxictr_are_looked_up_and_updated_once(frozen, tmp_path):
    pytest.importorskip("fuxictr", reason="needs: pip install -e .[fuxictr]")
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.layers import FeatureEmbedding
    from fuxictr.pytorch.models import BaseModel

    features = FeatureMap("made_here", str(tmp_path))
    names = [f"t{i}" for i in range(26)]
    spec = {"type": "categorical", "source": "", "vocab_size": 20, "padding_idx": 0}
    features.features = OrderedDict((name, dict(spec)) for name in names)
    model = BaseModel(features, verbose=0, model_root=str(tmp_path), metrics=["AUC"])
    model.embedding_layer = FeatureEmbedding(features, 8)
    counts = {name: counts_of(20) for name in names}
    fuxictr.convert(model, counts, budget=0.3, fused_optimizer=FUSED)
    if frozen:
        amtl.freeze(model)
    rows = {name: torch.randint(0, 20, (5,)) for name in reversed(names)}
    assert counted(lambda: model.embedding_layer(rows).sum().backward()) == ONE_OF_EACH


@pytest.mark.parametrize("frozen", [False, True])
def test_sparse_features_of_deepctr_are_looked_up_and_updated_once(frozen):
    pytest.importorskip("deepctr_torch", reason="needs: pip install -e .[deepctr]")
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DeepFM

    names = [f"t{i}" for i in range(26)]
    columns = [SparseFeat(name, 20, embedding_dim=8) for name in names]
    model = DeepFM(columns, columns, dnn_hidden_units=(4,))
    model.compile("adam", "binary_crossentropy")
    counts = {name: counts_of(20) for name in names}
    deepctr.convert(model, counts, budget=0.3, fused_optimizer=FUSED)
    if frozen:
        deepctr.freeze(model)
    rows = torch.randint(0, 20, (5, 26)).float()

    def step():
        model.optim.zero_grad()
        (model(rows).sum() + model.get_regularization_loss()).backward()
        model.optim.step()

    assert counted(step) == ONE_OF_EACH


def test_converted_tables_are_each_looked_up_and_updated_once():
    model = nn.ModuleDict({name: nn.Embedding(30, 8) for name in "ab"})
    counts = {name: counts_of(30) for name in "ab"}
    amtl.convert(model, counts, budget=0.3, fused_optimizer=FUSED)
    amtl.freeze(model)
    rows = torch.arange(4)
    assert counted(lambda: (model["a"](rows) + model["b"](rows)).sum().backward()) == {
        "lookup": 2,
        "lookup_update_": 2,
    }


@pytest.mark.parametrize("bits", ["32", "4"])
@pytest.mark.parametrize("method", ["amtl", "rule"])
def test_a_step_of_amtl_train_looks_up_and_updates_once(method, bits):
    sizes = {"dim": 8, "batch_size": 64, "validations": 1}
    config = TrainConfig("synthetic:600", "label", method=method, bits=bits, **sizes)
    learner = Learner(config, prepare(config, load_source(config.data)))
    learner.step()
    assert learner.frozen
    # A validation comes after the eighth.
    steps = [counted(learner.step) for _ in range(6)]
    assert steps.count(ONE_OF_EACH) >= (6 if bits == "32" else 5)
    # One step in eight looks up a sample more, which step sizes follow.
    assert all(step in (ONE_OF_EACH, {"lookup": 2, "lookup_update_": 1}) for step in steps)


def test_without_a_fused_optimizer_all_tiers_step_in_one_call():
    layer = AMTLEmbedding(50, 16, counts=counts_of(50), budget=0.2, bits=None, sparse=True).freeze()
    assert len(layer.blocks) > 1
    optimizer = Adam(layer.table_parameters(), lr=1e-2)
    layer(torch.arange(6)).sum().backward()
    assert counted(optimizer.step) == {"apply_": 1}
    assert counted(lambda: layer(torch.arange(6)).sum().backward()) == {
        "lookup": 1,
        "lookup_backward": 1,
    }


def calls_of_a_step(layers, learning) -> int:
    """All operations of a step after the first, of these layers in turn."""
    rows = torch.arange(6)
    for _ in range(2):
        with AllCalls() as step:
            sum(layer(rows).sum() for layer in layers).backward()
            learning.step()
        learning.zero_grad()
    return step.total


def test_sizes_of_many_layers_are_learned_by_operations_of_all():
    model = nn.ModuleList(nn.Embedding(200, 16) for _ in range(26))
    counts = {str(i): counts_of(200).roll(i) for i in range(26)}
    options = {"parametrization": "ordinal", "bits": None, "fused_optimizer": FUSED}
    amtl.convert(model, counts, budget=0.4, **options)
    learning = torch.optim.Adam(amtl.mask_parameters(model), lr=1e-3)
    assert len(learning.param_groups[0]["params"]) == 26
    # Of a layer: its lookup, slices of what was found for all, and Adam.
    assert calls_of_a_step(model, learning) <= 26 * 22 + 160


def test_sizes_that_are_learned_take_few_operations():
    options = {"parametrization": "ordinal", "sparse": True, "fused_optimizer": FUSED}
    layer = AMTLEmbedding(200, 16, counts=counts_of(200), budget=0.4, **options)
    learning = torch.optim.Adam(layer.mask_parameters(), lr=1e-3)
    # Twins, noise, mask, lookup, their backward and Adam. The solver is one, counted apart.
    assert calls_of_a_step([layer], learning) <= 105
    head = layer.head
    steps = (head.get_buffer("step_thresholds"), head.get_buffer("steps"))
    scores = head.scores().detach().double()
    with AllCalls() as solver:
        fit_shift._init_fn(scores, head.rows, *steps, head.capacity)
    # Found natively, where PyTorch takes a hundred.
    assert solver.working <= 1 and solver.total <= 8
