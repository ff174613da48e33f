"""What the page is made of: intervals, records, tuning, the plan, the summary."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from amtl.errors import UserError
from amtl.paper.page import blocks, rerun, write_html, write_markdown
from amtl.paper.protocol import (
    COMMON,
    DIM,
    Plan,
    Size,
    choose_sets,
    contenders,
    parse_set,
    variant,
)
from amtl.paper.records import Claim, append, read
from amtl.paper.statistics import half_width, holm, paired
from amtl.paper.summary import ranks, summarise
from amtl.paper.tuning import next_choice
from amtl.paper.work import count, finalists, further, jobs
from amtl.peers import PEERS, DoesNotFit, add_peer
from amtl.run.config import TABLE_RATES
from amtl.run.contenders import DECAYS, DROPOUT, WEAKER


def test_intervals_and_paired_tests():
    # Student's t at two degrees of freedom; deviation 1 over root 3.
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    assert half_width([1.0]) is None
    gain = paired({1: 2.0, 2: 4.0, 3: 6.0, 9: 0.0}, {1: 1.0, 2: 2.0, 3: 3.0, 8: 0.0})
    assert gain["mean"] == 2.0 and gain["seeds"] == 3
    # t = 2 root 3 at two degrees of freedom: p = 1 - t / root(t^2 + 2).
    t = 2 * 3**0.5
    assert gain["p"] == pytest.approx(1 - t / (t * t + 2) ** 0.5, rel=1e-6)
    assert paired({1: 1.0}, {2: 1.0}) is None
    assert paired({1: 1.0}, {1: 0.5}) == {"mean": 0.5, "half": None, "seeds": 1, "p": None}


def test_many_comparisons():
    assert holm([0.01, 0.04, None, 0.03]) == [0.03, 0.06, None, 0.06]
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_a_job_is_claimed_once(tmp_path):
    out, job = tmp_path / "runs.jsonl", {"seed": 1}
    with Claim(out, job) as mine:
        assert mine
        for _ in range(2):
            # Who does not get it must leave the lock alone.
            with Claim(out, job) as other:
                assert not other
        append(out, {"job": job})
    with Claim(out, job) as again:
        assert not again
    assert [p.name for p in tmp_path.iterdir()] == ["runs.jsonl"]


def test_a_line_cut_short_is_written_again(tmp_path):
    out = tmp_path / "runs.jsonl"
    append(out, {"job": 1})
    with out.open("a") as file:
        file.write('{"job": 2, "sco')
    assert [r["job"] for r in read(out)] == [1]
    append(out, {"job": 3})
    assert [r["job"] for r in read(out)] == [1, 3]


def test_every_flipped_bit_of_a_run_is_noticed(tmp_path):
    out = tmp_path / "runs.jsonl"
    runs = [{"job": {"seed": n, "set": "ü"}, "val_auc": 0.75 + n} for n in range(2)]
    out.write_text(json.dumps(runs[0]) + "\n")
    assert list(read(out)) == runs[:1], "lines of older versions have no checksum"
    out.unlink()
    for run in runs:
        append(out, run)
    whole = out.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        out.write_bytes(damaged)
        try:
            found = list(read(out))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            # Without its line break, the last one counts as not written to the end.
            assert found == runs[: 1 + (bit // 8 < len(whole) - 1)], bit
    out.write_bytes(whole)
    assert list(read(out)) == runs


def test_tuning_starts_at_the_default_and_never_repeats():
    space = {"a": (1, 2, 3), "b": ("x", "y")}
    tried = []
    while (choice := next_choice(space, tried, "s")) is not None:
        again = next_choice(space, tried, "s")
        assert again == choice
        tried.append((choice, None if choice["a"] == 2 else float(choice["a"])))
    assert tried[0][0] == {"a": 1, "b": "x"}
    assert len({json.dumps(choice) for choice, _ in tried}) == len(tried) == 6
    assert next_choice({}, [({}, 1.0)], "s") is None


def test_first_come_changes_of_the_best_so_far():
    contender, tried = contenders()["int"], []
    default = {name: values[0] for name, values in contender.space.items()}
    first, stronger = DECAYS
    decayed = {**default, "embedding_decay": first}
    better = {**decayed, "distillation": 0.5}
    wanted = [
        (default, 0.4),
        (decayed, 0.5),
        ({**decayed, "embedding_decay": stronger}, 0.45),
        ({**decayed, "embedding_decay": WEAKER * first}, 0.45),
        ({**decayed, "table_optimizer": "adam"}, 0.45),
        (better, 0.6),
        ({**better, "distillation": 0.8}, 0.5),
        ({**better, "bits": 8}, 0.7),
        # It did not fit.
        ({**better, "bits": 2}, None),
        ({**better, "bits": 8, "embedding_dropout": DROPOUT}, 0.1),
    ]
    for choice, score in wanted:
        assert next_choice(contender.space, tried, "s", contender.first) == choice
        tried.append((choice, score))
    suggested = next_choice(contender.space, tried, "s", contender.first)
    assert suggested not in [choice for choice, _ in tried]
    assert contenders()["amtl"].first == []


def test_plans_and_sets():
    assert parse_set("ml=a/b.csv:label:x,y") == ("ml", ("a/b.csv", "label", "x,y"))
    assert parse_set("t=synthetic:easy:300:label:")[1] == ("synthetic:easy:300", "label", "")
    assert list(choose_sets("medium, easy", ["t=a:b:"])) == ["medium", "easy", "t"]
    named = choose_sets("t,easy", ["t=a:b:", "u=c:d:e"])
    assert list(named) == ["t", "easy", "u"] and named["t"] == ("a", "b", "")
    named = choose_sets("medium@shop, nycflights13@date", ["t@day=a:b:"])
    assert "month" not in named["nycflights13@date"][2]
    assert named["medium@shop"] == ("synthetic:medium", "label", "") and "t@day" in named
    assert variant("t@day") == ("order:day", "dnn") and variant("t") == ("random", "dnn")
    assert variant("t@day+dcn") == ("order:day", "dcn") and variant("t+din") == ("random", "din")
    for call in (
        lambda: parse_set("nothing"),
        lambda: choose_sets("nothing", []),
        lambda: choose_sets("nothing@date", []),
        lambda: parse_set("a+dcn=data.csv:label:"),
        lambda: Plan({"a": ("a", "b", "")}, [0.1], ["fixed"], backbones=["nothing"]),
        lambda: Plan({"a": ("a", "b", "")}, [0.1], ["fixed"], backbones=["dnn"]),
        lambda: Plan({}, [0.1], ["fixed"]),
        lambda: Plan({"a": ("a", "b", "")}, [0.1], ["nothing"]),
        lambda: Plan({"a": ("a", "b", "")}, [2.0], ["fixed"]),
        lambda: Plan({"a": ("a", "b", "")}, [0.1], ["fixed"], seeds=3, finalist_seeds=2),
    ):
        with pytest.raises(UserError):
            call()


def test_contenders_have_equal_bytes():
    known, size = contenders(), Size(1000, 4)
    assert set(PEERS) < set(known)
    first = {k: v[0] for k, v in COMMON.items()}
    fixed = known["fixed"].settings(0.2, size, first)
    trained = {k: v for k, v in first.items() if k != "table_rate"}
    assert fixed == {**trained, "table_lr": TABLE_RATES["adam"], "method": "fixed", "dim": 3}
    slower = known["fixed"].settings(0.2, size, {"table_optimizer": "adagrad", "table_rate": 0.5})
    assert slower["table_lr"] == 0.5 * TABLE_RATES["adagrad"]
    with pytest.raises(DoesNotFit):
        known["fixed"].settings(0.9 / DIM, size, first)
    four = known["int"].settings(0.125, size, {**first, "bits": 4})
    # 16 codes of 4 bits are all of it, and step sizes need room.
    assert four["bits"] == "4" and four["dim"] == 14
    own = known["amtl-32"].settings(0.125, size, {})
    assert own["budget"] == pytest.approx(0.125 - (8 * 17 + 4 * 4) / (4 * DIM * 1000))
    assert known["aml"].settings(1.0, size, {})["table_options"]["twins"] is False
    peer = known["qr"].settings(0.1, size, {**first, "operation": "add"})
    assert peer == {
        **{k: v for k, v in fixed.items() if k != "dim"},
        "method": "qr",
        "budget": 0.1,
        "table_options": {"operation": "add"},
    }
    for contender in known.values():
        assert contender.about and (contender.tunes_itself or set(COMMON) <= set(contender.space))


def test_choices_from_before_optimizers_were_tuned_are_those_of_adam():
    contender, size = contenders()["fixed"], Size(1000, 4)
    before = {"table_lr": 0.1, "embedding_dropout": 0.1, "distillation": 0.0}
    completed = contender.completed(before)
    assert set(completed) == set(contender.space) and completed["embedding_decay"] == 0
    settings = contender.settings(0.2, size, completed)
    assert settings["table_optimizer"] == "adam" and settings["table_lr"] == pytest.approx(0.1)
    assert contender.completed(completed) == completed
    further = next_choice(contender.space, [(completed, 0.5)], "s")
    assert further is not None and set(further) == set(contender.space)


def choice_of(method, rate=0) -> dict:
    space = contenders()[method].space
    return {k: v[rate] if k == "table_rate" else v[0] for k, v in space.items()}


def record(method, auc, budget=0.125, trial=None, seed=None, rate=0, **more):
    choice = choice_of(method, rate)
    job = {"set": "s", "budget": budget, "method": method}
    job |= {"trial": trial} if seed is None else {"seed": seed, "choice": choice}
    line = {
        "job": job,
        "choice": choice,
        "score": auc - 0.5,
        "val_auc": auc,
        "val_logloss": 0.5,
        "bytes": int(budget * 1000),
        "dense_bytes": 1000,
        "cpu": 1.0,
        "epochs": 2.0,
        "options": {},
        **more,
    }
    if seed is not None:
        line |= {"test_auc": auc, "test_logloss": 0.5, "bias": 0.0, "ece": 0.01}
        line |= {"loss_by_decile": [0.5] * 10, "sizes": [[1.0, 3.0, 9], [9.0, 8.0, 1]]}
    return line


@pytest.fixture
def plan() -> Plan:
    sets = {"s": ("data.csv", "label", "a,b")}
    return Plan(sets, [0.03, 0.125], ["fixed", "amtl", "qr"], trials=2, seeds=2, finalist_seeds=3)


def make_records():
    records = [record("fixed", 0.7, 1.0, trial=0), record("fixed", 0.69, 1.0, trial=1, rate=1)]
    records += [record("fixed", 0.70 + 0.01 * s, 1.0, seed=s) for s in (10, 11)]
    records += [record("qr", 0.6, trial=0, rate=1), record("qr", 0.65, trial=1)]
    records += [record("qr", 0.61 + 0.01 * s, seed=s) for s in (10, 11)]
    # Of the choice that lost, from when there was one trial: of no account.
    records += [record("qr", 0.99, seed=10, rate=1)]
    records += [record("amtl", 0.72, trial=0), record("amtl", 0.75, 0.03, trial=0)]
    records += [record("amtl", 0.80 + 0.02 * s, seed=s) for s in (10, 11)]
    records += [record("amtl", 0.41 + 0.03 * s, 0.03, seed=s) for s in (10, 11)]
    refused = {k: v for k, v in record("fixed", 0.0, 0.03, trial=0).items() if k != "score"}
    return [*records, {**refused, "refused": "a number a row is larger"}]


def test_budgets_are_spent_or_limits(plan):
    summary = summarise(make_records(), plan, {"amtl": "0"})
    cells = {(c["method"], c["budget"]): c for c in summary["cells"]}
    assert cells["qr", 0.125]["choice"] == choice_of("qr") and cells["qr", 0.125]["trials"] == 2
    assert cells["qr", 0.125]["seed_auc"] == pytest.approx([0.71, 0.72])
    against = cells["qr", 0.125]["against"]
    assert against["mean"] == pytest.approx(1.01 - 0.715) and against["seeds"] == 2
    assert cells["fixed", 0.03]["refused"] and not cells["fixed", 0.03]["seeds"]
    # Fewer bytes validated better in tuning, whatever the test split says.
    limits = {(e["method"], e["budget"]): e for e in summary["at_most"]}
    assert limits["amtl", 0.125]["from"] == 0.03
    assert limits["amtl", 0.125]["test_auc"] == pytest.approx(0.725)
    assert ("fixed", 0.125) not in limits
    assert ranks(summary["at_most"]) == {"amtl": 1.0, "qr": 2.0}
    assert [e["against"]["p_holm"] for e in summary["at_most"] if e["against"]] == [
        pytest.approx(limits["qr", 0.125]["against"]["p"])
    ]


def test_the_page_says_what_there_is(plan):
    summary = json.loads(json.dumps(summarise(make_records(), plan, {"amtl": "0"})))
    text, page = write_markdown(summary), write_html(summary)
    assert "4 of 7 configurations" in text and "2 fresh seed(s)" in text
    assert "| qr | – | 0.7150 ± " in text and "1.0100 ± 0.1271 *" in text
    assert "| fixed | s ≤ 3 % | a number a row is larger |" in text
    assert page.count("<svg") == 2 and "src=" not in page and 'href="http' not in page
    assert rerun(summary, "s").startswith(
        "amtl paper --sets '' --also s=data.csv:label:a,b --methods METHOD --budgets PERCENT"
    )
    empty = summarise([], plan, {})
    assert "0 of 7 configurations" in write_markdown(empty)
    assert "7 configurations have not been run yet" in write_markdown(empty)
    assert next(b.title for b in blocks(empty)) == "How" and "<svg" not in write_html(empty)


def test_what_is_left_to_do_comes_in_rounds(plan):
    records = make_records()
    left = list(jobs(records, plan))
    assert left[0] == {"set": "s", "budget": 0.03, "method": "fixed", "trial": 1}
    assert finalists(records, plan, "s", 0.125) == set()
    records += [record("fixed", 0.5, trial=t, rate=t) for t in (0, 1)]
    records += [record("fixed", 0.5, seed=s) for s in (10, 11)]
    assert finalists(records, plan, "s", 0.125) == {"amtl", "qr", "fixed"}
    third = [j for j in jobs(records, plan) if j.get("seed") == 12]
    assert {(j["method"], j["budget"]) for j in third} >= {("amtl", 0.125), ("qr", 0.125)}
    assert count(plan) >= len(records)


def test_what_tunes_itself_gets_seeds_and_no_tuning(plan):
    left = [j for j in jobs([], plan) if j["method"] == "amtl"]
    assert [(j.get("seed"), j.get("choice")) for j in left] == [
        (seed, {}) for seed in (10, 10, 11, 11)
    ]
    others = [record(m, 0.6, trial=t, rate=t) for m in ("fixed", "qr") for t in (0, 1)]
    others += [record(m, 0.6, seed=s) for m in ("fixed", "qr") for s in (10, 11)]
    seeds = [record("amtl", 0.7 + 0.1 * n, seed=s) for n, s in enumerate((10, 11))]
    assert finalists(others + seeds[:1], plan, "s", 0.125) == set()
    assert finalists(others + seeds, plan, "s", 0.125) == {"amtl", "fixed", "qr"}
    (cell,) = (c for c in summarise(seeds, plan, {})["cells"])
    assert cell["trials"] == 0 and cell["choice"] == {} and cell["refused"] is None
    assert cell["tuned_score"] == pytest.approx(0.25) and cell["dense_bytes"] == 1000
    refused = [{k: v for k, v in run.items() if k in ("job", "choice")} for run in seeds]
    refused = [{**run, "refused": "too small"} for run in refused]
    assert finalists(others + refused, plan, "s", 0.125) == {"fixed", "qr"}
    (cell,) = (c for c in summarise(refused, plan, {})["cells"])
    assert cell["refused"] == "too small" and cell["choice"] is None and not cell["seeds"]


def test_the_best_are_run_with_other_backbones(plan):
    names = ["fixed", "amtl", "qr", "mde", "ptq", "random"]
    plan = replace(plan, methods=names, budgets=[0.125], trials=1, backbones=["dcn", "deepfm"])
    records = [record("fixed", 0.7, 1.0, trial=0)]
    records += [record("fixed", 0.7, 1.0, seed=s) for s in (10, 11)]
    for method, auc in zip(names, (0.5, 0.8, 0.7, 0.75, 0.6, 0.4), strict=True):
        assert not further(records, plan)
        records += [record(method, auc, trial=0), record(method, auc, seed=10)]
        records += [record(method, auc, seed=11)]
    # The best three and `fixed`, and the table of full size with each backbone.
    of_dcn = [
        ("s+dcn", 1.0, "fixed"),
        *(("s+dcn", 0.125, m) for m in ("fixed", "amtl", "qr", "mde")),
    ]
    others = further(records, plan)
    assert others[:5] == of_dcn and {cell[0] for cell in others} == {"s+dcn", "s+deepfm"}
    assert len(others) == 10 and count(plan) >= len(records) + 10 * 3
    left = list(jobs(records, plan))
    # Third seeds of finalists come before, and each cell is tuned first.
    assert [j["set"] for j in left[:5]] == ["s"] * 5 and left[5] == {
        **dict(zip(("set", "budget", "method"), of_dcn[0], strict=True)),
        "trial": 0,
    }
    for line in (record("fixed", 0.74, 1.0, trial=0), record("fixed", 0.74, 1.0, seed=10)):
        line["job"]["set"] = "s+dcn"
        records.append(line)
    summary = json.loads(json.dumps(summarise(records, plan, {})))
    assert summary["plan"]["cells"] == 7 + 10 and list(summary["plan"]["sets"]) == ["s"]
    text = write_markdown(summary)
    assert "## s+dcn" in text and "With dcn in place of the MLP alone" in text
    assert rerun(summary, "s+dcn").startswith("amtl paper --sets '' --also s=data.csv:label:a,b")
    assert " --backbones dcn --out" in rerun(summary, "s+dcn")
    assert " --backbones '' --out" in rerun(summary, "s")
    assert "these runs are of the MLP alone" not in text


def test_files_with_methods(tmp_path):
    for name, text in (
        ("nothing", "x = 1"),
        ("broken", "1 / 0"),
        ("qr", "from amtl.peers import Peer\nclass A(Peer): ..."),
        ("two", "from amtl.peers import Peer\nclass A(Peer): ...\nclass B(Peer): ..."),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        with pytest.raises(UserError, match=f"--add .*{name}.py"):
            add_peer(path)
    with pytest.raises(UserError, match="no such"):
        add_peer(tmp_path / "missing.py")
