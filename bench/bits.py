"""The bits that the public functions give on drawn inputs, as one hash a case.

A change that must not change results is held against the commit before it:

    python bench/bits.py after.json
    PYTHONPATH=FOLDER_OF_THE_OTHER_COMMIT python bench/bits.py before.json
    python bench/bits.py --compare before.json after.json

It calls what has been there since the first operators, so any commit whose native module is built
can be asked. Numbers are drawn from a normal distribution: another order of sums shows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import amtl_kernels as ak

ROWS, LOOKUPS, BAGS, GROUPS = 3000, 12_000, 700, 40
TABLES = 3
DIMS = (1, 7, 16, 64, 130)
TYPES = (torch.float32, torch.bfloat16)
FORMS = ("masked", "adaptive", "tiered")
POOLED = ("none", "sum", "mean", "weighted")
RULES = {
    "sgd": ak.optim.SGD,
    "adagrad": ak.optim.Adagrad,
    "rowwise_adagrad": ak.optim.RowwiseAdagrad,
    "adam": ak.optim.Adam,
}
THREADS = (1, 2, 4)


class Case(NamedTuple):
    """What is asked of a public function, of drawn numbers."""

    form: str
    pooled: str
    dtype: torch.dtype
    dim: int
    wide: bool
    rule: str
    """Of the optimizer that is fused into the backward; "" for none."""
    several: bool
    threads: int

    def name(self) -> str:
        """Tells it apart from all others."""
        ids = "int64" if self.wide else "int32"
        parts = (self.form, self.pooled, str(self.dtype)[6:], f"D {self.dim}", ids)
        tables = f"{TABLES} tables" if self.several else "1 table"
        return ", ".join((*parts, self.rule or "gradients", tables, f"{self.threads} threads"))


def cases() -> Iterator[Case]:
    """Every form and way of pooling with all that is asked of it, types and widths in turn."""
    turns = itertools.cycle(itertools.product(DIMS, TYPES, (True, False)))
    for form, pooled, rule in itertools.product(FORMS, POOLED, ("", *RULES)):
        for several in (False, True) if pooled != "none" else (False,):
            for dim, dtype, wide in itertools.islice(turns, 7):
                for threads in THREADS:
                    yield Case(form, pooled, dtype, dim, wide, rule, several, threads)


def draw(case: Case) -> dict[str, Any]:
    """Tables of a case, and what is looked up in them."""
    g = torch.Generator().manual_seed(7)
    number = TABLES if case.several else 1
    tables: list[dict[str, Any]] = []
    for t in range(number):
        rows = ROWS - 500 * t
        weight = torch.randn(rows, case.dim, generator=g).to(case.dtype)
        sizes = torch.randint(0, case.dim + 1, (rows,), generator=g).to(torch.int32)
        groups = torch.randint(0, GROUPS, (rows,), generator=g).to(torch.int32).sort().values
        columns = torch.randint(0, case.dim + 1, (GROUPS, 4), generator=g).to(torch.int32)
        widths = sorted({case.dim, (case.dim + 1) // 2, max(1, case.dim // 4)}, reverse=True)
        ends = [rows * (c + 1) // len(widths) for c in range(len(widths))]
        starts = [0, *ends]
        blocks = [
            weight[start:end, :width].clone()
            for start, end, width in zip(starts, ends, widths, strict=False)
        ]
        mask = torch.rand(GROUPS, case.dim, generator=g)
        tables.append(
            {
                "weight": weight,
                "sizes": sizes,
                "groups": groups,
                "columns": columns,
                "mask": mask.requires_grad_(),
                "blocks": blocks,
                "ends": ends,
            }
        )
    least = min(len(table["weight"]) for table in tables)
    skewed = torch.rand(LOOKUPS, generator=g).pow(4).mul(least).long()
    indices = skewed if case.wide else skewed.int()
    ends = torch.randint(0, LOOKUPS, (number * BAGS - 1,), generator=g).sort().values
    offsets = torch.cat([torch.zeros(1), ends, torch.full((1,), LOOKUPS)]).to(indices.dtype)
    weights = torch.randn(LOOKUPS, generator=g).to(case.dtype)
    lookups = LOOKUPS if case.pooled == "none" else BAGS
    grad = torch.randn(lookups, number * case.dim, generator=g).to(case.dtype)
    return {
        "tables": tables,
        "indices": indices,
        "offsets": offsets,
        "weights": weights.requires_grad_(case.pooled == "weighted" and not case.several),
        "grad": grad,
    }


def look_up(case: Case, inputs: dict[str, Any], **fused: Any) -> Tensor:
    """One call of the public function."""
    functions: Any = ak.fused if fused else ak
    tables, indices, offsets = inputs["tables"], inputs["indices"], inputs["offsets"]
    given: dict[str, Any] = {"padding_idx": 3, **fused}
    if case.form == "adaptive":
        given["seed"] = 11
    if case.form == "tiered" and not case.several:
        given["embedding_dim"] = case.dim
    names = {
        "masked": ("weight", "sizes"),
        "adaptive": ("weight", "groups", "columns", "mask"),
        "tiered": ("blocks", "ends"),
    }[case.form]
    first = 2 if case.form == "tiered" else 1
    if case.several:
        table: list[Any] = [[one[name] for one in tables] for name in names]
        name = f"{case.form}_embedding_bag_tables"
        if case.form == "tiered":
            given["embedding_dims"] = [case.dim] * len(tables)
    else:
        table = [tables[0][name] for name in names]
        name = f"{case.form}_embedding" + ("" if case.pooled == "none" else "_bag")
    if case.pooled == "none":
        arguments = [*table[:first], indices, *table[first:]]
    else:
        arguments = [*table[:first], indices, offsets, *table[first:]]
        given["mode"] = "mean" if case.pooled == "mean" else "sum"
        if not case.several:
            given["include_last_offset"] = True
        if case.pooled == "weighted":
            given["per_sample_weights"] = inputs["weights"]
    out: Tensor = getattr(functions, name)(*arguments, **given)
    return out


def learnable(case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    """The tables' tensors, as parameters."""
    found = []
    for table in inputs["tables"]:
        if case.form == "tiered":
            table["blocks"] = [torch.nn.Parameter(block) for block in table["blocks"]]
            found += table["blocks"]
        else:
            table["weight"] = torch.nn.Parameter(table["weight"])
            found.append(table["weight"])
    return found


def bits(case: Case) -> str:
    """A hash of all that comes out of a case."""
    torch.set_num_threads(case.threads)
    inputs = draw(case)
    parameters = learnable(case, inputs)
    found: list[Tensor] = []
    if case.rule:
        optimizer = RULES[case.rule](parameters, lr=0.05)
        for _ in range(2):
            look_up(case, inputs, optimizer=optimizer).backward(inputs["grad"])
        found += [p.detach() for p in parameters]
        for parameter in parameters:
            found += [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor)]
    else:
        out = look_up(case, inputs)
        out.backward(inputs["grad"])
        found.append(out.detach())
        for parameter in parameters:
            assert parameter.grad is not None
            found.append(parameter.grad.coalesce().to_dense())
    others = [inputs["weights"], *(table["mask"] for table in inputs["tables"])]
    found += [tensor.grad for tensor in others if tensor.grad is not None]
    digest = hashlib.sha256()
    for tensor in found:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(before: dict[str, str], after: dict[str, str]) -> Iterable[str]:
    """Names of cases whose bits differ, or which one side lacks."""
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--compare"]:
        before, after = (json.loads(Path(name).read_text()) for name in arguments[1:])
        differ = list(compare(before, after))
        print(*differ, sep="\n")
        print(f"{len(before)} and {len(after)} cases, {len(differ)} differ")
        return 1 if differ else 0
    found = {case.name(): bits(case) for case in cases()}
    Path(arguments[0]).write_text(json.dumps(found, indent=1))
    print(f"{len(found)} cases, {len(set(found.values()))} different hashes, by {ak.__file__}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
