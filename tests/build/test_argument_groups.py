"""Arguments come in groups with one order, one type and one name each, on every floor.

The schemas say which. Fakes, reference and Triton take them as named tuples, C++ as structs of the
same names, and the entries of CPU and CUDA have one signature. Kernels are handed the same names,
resolved to what their device reads.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from amtl_kernels import _arguments, _autograd, _schema, reference

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def names(arguments: str) -> list[str]:
    """Of ``int[]? dims, Tensor grad=None`` the words before commas and equals signs."""
    return re.findall(r"(\w+)(?:=\w+)?(?:,|$)", arguments)


GROUPS = {
    "Tables": ["blocks", *names(_schema._TABLES)],
    "Bags": names(_schema._BAGS),
    "Wishes": names(_schema._WISHES),
    "Step": names(_schema._STEP),
    "FewBits": names(_schema._FEW_BITS),
}


def members(path: str, struct: str) -> list[str]:
    """Data members of a struct, in order, without what is known only once it is checked."""
    code = (CSRC / path).read_text(encoding="utf-8")
    found = re.search(rf"^struct {struct}\b[^;{{]*\{{$(.*?)^\}};$", code, re.MULTILINE | re.DOTALL)
    assert found, f"{path} has no struct {struct}"
    given = re.split(r"// (?:Of each table, k|K)nown once", found[1])[0].partition("batch = 0;")[0]
    given = re.sub(r"//.*", "", given)
    member = r"(?<=[ *,])(\w+)(?:\[\w+\])?(?: = [^,;()]+)?(?=[,;])"
    plain = re.findall(r"^  [A-Za-z_][^(){}\n]*;", given, re.MULTILINE)
    return [name for line in plain for name in re.findall(member, re.sub(r"<.*>", "", line))]


def entry(path: str, function: str) -> list[tuple[str, str]]:
    """Types and names of the parameters of an operator's C++ entry."""
    code = (CSRC / path).read_text(encoding="utf-8")
    found = re.search(rf"^[\w:<>, ]+ {function}\(([^)]*)\) \{{", code, re.MULTILINE)
    assert found, f"{path} has no {function}"
    plain = re.sub(r"/\*(\w+)\*/", r"\1", found[1])
    split = [re.sub(r"const |&", "", part).split() for part in plain.split(",")]
    return [(" ".join(kind), name) for *kind, name in split]


def in_values(parameters: list[tuple[str, str]]) -> list[str]:
    """Names of the values that groups, and parameters in none, are made of."""
    return [each for kind, name in parameters for each in GROUPS.get(kind, [name])]


def of_python(function: object) -> list[tuple[str, str]]:
    hints = get_type_hints(function)
    hints.pop("return")
    groups = {getattr(_arguments, name): name for name in GROUPS}
    kinds = ((name, (hint, *get_args(hint))) for name, hint in hints.items())
    return [(next((groups[k] for k in each if k in groups), ""), name) for name, each in kinds]


def of_schema(op: str) -> list[str]:
    inside = _schema.SCHEMAS[op].partition(" -> ")[0].strip("()")
    return names(re.sub(r"\(\w!\)", "", inside))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_the_same_in_schemas_python_and_cpp(group: str) -> None:
    wanted = GROUPS[group]
    assert wanted and list(getattr(_arguments, group)._fields) == wanted
    few = GROUPS["FewBits"] if group == "Tables" else []
    # What tables of few bits have is put into their table once it is read.
    assert members("torch/arguments.h", group) == wanted + few


@pytest.mark.parametrize("op", _schema.SCHEMAS)
def test_an_operator_takes_the_same_groups_everywhere(op: str) -> None:
    triton = pytest.importorskip("amtl_kernels.triton.operators", exc_type=ImportError)
    wanted = of_python(getattr(reference, op))
    assert in_values(wanted) == of_schema(op)
    assert of_python(getattr(triton, op)) == wanted
    fake = {"lookup": "_fake_lookup", "lookup_backward": "_fake_backward"}
    fake["lookup_update_"] = "_fake_update"
    if op in fake:
        assert of_python(getattr(_autograd, fake[op])) == wanted
    function = "".join(word.title() for word in op.split("_"))
    rooms = {"lookup": "lookup", "lookup_backward": "backward", "lookup_update_": "update"}
    cpu = entry("torch/cpu_lookup.cpp" if op in rooms else "torch/cpu_optimizer.cpp", function)
    assert in_values(cpu) == of_schema(op)
    assert cpu == entry(f"torch/cuda_{rooms.get(op, 'optimizer')}.cpp", function)
    assert [name for _, name in cpu] == [name for _, name in wanted]


RESOLVED = {"pooling": "mean", "seed": "seed_term", "row_groups": "row_group", "optimizer": "rule"}
"""Once for a call, what kernels would else ask at every row: a mean or not, the seed's term of the
hash, the groups of one table, the rule of that number."""
KERNELS = {
    "cpu": [
        ("cpu/resolve.h", "LookupTable"),
        ("cpu/resolve.h", "SizeTable"),
        ("cpu/forward.h", "BagTable"),
    ],
    "cuda": [
        ("kernels/params.h", "Lookups"),
        ("kernels/params.h", "DenseTable"),
        ("kernels/params.h", "TieredTable"),
        ("kernels/params.h", "CodeRows"),
    ],
}
APART = {
    # Of tables it is not the list that kernels see, but one of them: its memory, where its blocks
    # end, and how wide its rows are.
    "cpu": {"blocks", "block_counts", "sizes", "step_ends", "dims"},
    "cuda": {"blocks", "block_counts", "sizes", "step_ends", "dims", "bits", "steps"},
}


@pytest.mark.parametrize("device", KERNELS)
def test_kernels_are_handed_the_same_names(device: str) -> None:
    known = {name for where in KERNELS[device] for name in members(*where)}
    asked = {name for group in ("Tables", "Bags", "FewBits") for name in GROUPS[group]}
    assert {RESOLVED.get(name, name) for name in asked - APART[device]} <= known
    hyper = members("kernels/shared.h", "Hyper")
    assert {"lr", "eps", "weight_decay", "beta1", "beta2"} <= set(hyper)


def test_triton_is_handed_the_same_names() -> None:
    lookups = pytest.importorskip("amtl_kernels.triton.lookups", exc_type=ImportError)
    known = {*lookups.Lookups.__annotations__, *lookups.BagTable.__annotations__}
    # Whether there is an offset more than bags is seen from how many there are.
    asked = set(GROUPS["Bags"]) - {"include_last_offset"}
    assert {RESOLVED.get(name, name) for name in asked} <= known


def test_values_become_groups_in_turn() -> None:
    def takes(a: int, wishes: _arguments.Wishes, few: _arguments.FewBits | None = None) -> object:
        return a, wishes, few

    takes.__annotations__ = {
        "a": int,
        "wishes": _arguments.Wishes,
        "few": _arguments.FewBits | None,
        "return": object,
    }
    of_values = _arguments.in_groups(takes)
    assert inspect.signature(of_values).parameters.keys() == {"a", "wishes", "few"}
    assert of_values(1, True, False) == (1, _arguments.Wishes(True, False), None)
    assert of_values(1, True, False, None, [], None)[2] is None
    few = ([], [4], [7])
    assert of_values(1, True, False, *few)[2] == _arguments.FewBits(*few)
