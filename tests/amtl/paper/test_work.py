"""Runs of `amtl paper`, from tuning to the page, on data of a few seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from amtl import cli
from amtl.paper import work as module
from amtl.paper.page import write_markdown
from amtl.paper.protocol import Plan, variant
from amtl.paper.records import read
from amtl.paper.work import Data, expected_calibration_error, rank_correlation, sizes_by_count, work
from amtl.peers import PEERS
from amtl.run.contenders import DECAYS, DROPOUT
from amtl.store.files import read_json

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "my_method.py"
SET = ("synthetic:medium:2000", "label", "user,item,shop")


@pytest.fixture
def plan() -> Plan:
    names = ["fixed", "int", "magprune"]
    return Plan({"s": SET}, [0.1], names, trials=2, seeds=1, finalist_seeds=2, epochs=1)


def test_tuning_sees_no_test_split_and_goes_on_where_it_was(plan, tmp_path, monkeypatch):
    tuned = []
    train = module.train

    def watched(config, task, taught=None):
        tuned.append(task.test is task.val)
        assert (config.distillation or 0) == 0 or taught is not None
        return train(config, task, taught)

    monkeypatch.setattr(module, "train", watched)
    out = tmp_path / "runs.jsonl"
    work(plan, out)
    records = list(read(out))
    lines = out.read_text().splitlines()
    tested = ["test_auc" in r for r in records if "refused" not in r]
    # A teacher is trained on the task as it is, and says nothing of the test split.
    assert sum(not t for t in tuned) >= sum(tested) and sum(tuned) == tested.count(False)
    assert {r["job"]["method"] for r in records} == {"fixed", "int", "magprune"}
    for r in records:
        budget = r["job"]["budget"] * r.get("dense_bytes", 0)
        assert "refused" in r or r["bytes"] <= budget
    seeds = [r["job"] for r in records if "seed" in r["job"] and r["job"]["method"] == "int"]
    assert [job["seed"] for job in seeds] == [10, 11]

    work(plan, out)
    assert out.read_text().splitlines() == lines
    # A run that was lost comes out as it was.
    at = next(i for i, r in enumerate(records) if r["job"]["method"] == "magprune")
    out.write_text("\n".join([*lines[:at], *lines[at + 1 :]]) + "\n")
    work(plan, out)
    again = next(r for r in read(out) if r["job"] == records[at]["job"])
    assert again["val_auc"] == records[at]["val_auc"] and again["choice"] == records[at]["choice"]
    # More trials go on from those that there are.
    work(replace(plan, trials=3), out)
    trials = [
        r["job"]["trial"] for r in read(out) if r["job"]["method"] == "int" and "trial" in r["job"]
    ]
    assert sorted(trials) == [0, 1, 2]


def test_a_teacher_is_of_the_same_seed(plan, monkeypatch):
    data = Data(*SET)
    seen = []
    train = module.train

    def watched(config, task, taught=None):
        seen.append((config.method, config.seed, config.embedding_dropout, config.embedding_decay))
        return train(config, task, taught)

    monkeypatch.setattr(module, "train", watched)
    labels = data.teacher(5, 1)
    assert data.teacher(5, 1) is labels
    assert seen[:2] == [("fixed", 5, None, decay) for decay in reversed(DECAYS)]
    assert {method for method, *_ in seen} == {"fixed"} and {seed for _, seed, *_ in seen} == {5}
    # The last one has dropout, and what was best before.
    *plain, dropped = seen
    assert [dropout for _, _, dropout, _ in plain] == [None] * len(plain)
    assert dropped[2] == DROPOUT and dropped[3] in [decay for *_, decay in plain]
    assert labels.shape == data.task.train.labels.shape
    assert float(labels.min()) > 0 and float(labels.max()) < 1


def test_sets_in_an_order_and_with_a_backbone(plan):
    data = Data(*SET, *variant("s@user+dcn"))
    user = data.source.frame["user"].to_numpy()
    counts = data.task.encoder.counts()[data.task.encoder.field_rows(0)]
    # The first four fifths in the order of users have all that was counted.
    assert "user" in data.task.encoder.names and data.task.encoder.names[0] == "user"
    assert int((counts > 0).sum()) == len(set(sorted(user)[:1600]))
    config = data.config({"method": "fixed", "epochs": 1})
    assert (config.split, config.backbone) == ("order:user", "dcn")
    assert type(module.train(config, data.task).model.interaction).__name__ == "CrossNetwork"
    # Unless it is asked for, what orders the samples is no field.
    named = Data("synthetic:medium:2000", "label", "", *variant("s@user"))
    assert "user" not in named.task.encoder.names and "item" in named.task.encoder.names


def test_backbones_follow_from_the_best(plan, tmp_path):
    small = replace(plan, methods=["fixed", "qr"], trials=1, finalist_seeds=1, backbones=["deepfm"])
    out = tmp_path / "runs.jsonl"
    work(small, out)
    made = [r["job"] for r in read(out)]
    others = [(j["budget"], j["method"]) for j in made if j["set"] == "s+deepfm"]
    # Tuned and tested, the table of full size too; the last in order.
    assert set(others) == {(1.0, "fixed"), (0.1, "fixed"), (0.1, "qr")}
    assert len(others) >= 5 and [j["set"] for j in made[-len(others) :]] == ["s+deepfm"] * len(
        others
    )
    by_set = {
        j["set"]: r["val_auc"] for r, j in zip(read(out), made, strict=True) if "val_auc" in r
    }
    assert by_set["s"] != by_set["s+deepfm"]


def test_planted_widths_are_found_again():
    data = Data(*SET)
    names = data.task.encoder.names
    assert data.planted.shape == (data.size.rows,)
    rows = data.task.encoder.field_rows(names.index("user"))
    known = data.planted[rows] >= 0
    # All but the row of values never seen.
    assert int((~known).sum()) == 1
    counts = data.task.encoder.counts()[rows][known]
    assert rank_correlation(counts.double(), data.planted[rows][known].double()) > 0.1
    assert Data("synthetic:300", "label", "").planted is None


def test_details():
    predicted = torch.tensor([0.2] * 10 + [0.8] * 10)
    assert expected_calibration_error(predicted, torch.cat([torch.ones(10), torch.zeros(10)])) == (
        pytest.approx(0.8)
    )
    sizes = sizes_by_count(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([1, 2, 4]))
    assert sizes == [[1.5, 2.0, 2], [4.0, 8.0, 1]]
    assert rank_correlation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) is None


def test_one_command(tmp_path, capsys, monkeypatch):
    def run(*args):
        with pytest.raises(SystemExit) as done:
            cli.main(["paper", "--out", str(tmp_path), *map(str, args)])
        return done.value.code

    tiny = ("--sets", "", "--also", f"tiny={':'.join(SET)}", "--budgets", "12.5", "--epochs", 1)
    tiny = (*tiny, "--backbones", "")
    few = (*tiny, "--methods", "amtl,qr", "--trials", 2, "--seeds", 1, "--finalist-seeds", 1)
    assert run(*few, "--add", EXAMPLE, "--jobs", 2) == 0
    assert "my_method, seed 10: val AUC" in capsys.readouterr().out.replace("\n", " ")
    summary = read_json(tmp_path / "summary.json")
    done = {c["method"]: c for c in summary["cells"] if c["budget"] == 0.125}
    assert set(done) == {"amtl", "qr", "my_method"}
    assert all(c["seeds"] == [10] and c["bytes"] <= 0.125 * c["dense_bytes"] for c in done.values())
    page = (tmp_path / "paper.html").read_text()
    assert "my_method" in page and "<svg" in page
    lines = (tmp_path / "runs.jsonl").read_text()
    made = [json.dumps(r["job"], sort_keys=True) for r in read(tmp_path / "runs.jsonl")]
    assert len(set(made)) == len(made)
    (tmp_path / "paper.html").unlink()
    assert run("--summary", tmp_path / "summary.json") == 0
    assert (tmp_path / "paper.html").read_text() == page
    assert run(*few, "--page-only") == 0 and (tmp_path / "runs.jsonl").read_text() == lines
    (tmp_path / "other.json").write_text("{}")
    assert run("--summary", tmp_path / "other.json") == 1
    assert run(*tiny, "--methods", "nothing") == 1
    assert run("--budgets", "ten") == 1
    assert run(*tiny[:-1], "nothing") == 1
    assert run(*tiny, "--methods", "fixed", "--also", "gone=gone.csv:label:") == 1
    assert "gone.csv" in capsys.readouterr().err
    monkeypatch.delitem(PEERS, "my_method")


OWN = """
import torch
from amtl.peers import Part, Peer


class Own(Peer):
    def __init__(self, facts):
        super().__init__(facts)
        self.weight = self.row_table(facts.budget // 64, 16)

    def embed(self, rows):
        return {embedded}

    def parts(self):
        return [Part({count}, 32)]
"""
RIGHT = {
    "embedded": "self.look_up(self.weight, rows % len(self.weight))",
    "count": "self.weight.numel()",
}


@pytest.fixture
def quick_workers(monkeypatch):
    """Workers are forks of a process that has imported what they need, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["amtl.paper.work"])
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: context)


def test_a_method_of_ones_own_as_its_file_is_now(tmp_path, capsys, quick_workers):
    file, out = tmp_path / "own.py", tmp_path / "out"
    tiny = ("--sets", "", "--also", f"tiny={':'.join(SET)}", "--budgets", "12.5", "--epochs", 1)
    few = (*tiny, "--backbones", "", "--methods", "own", "--add", file, "--out", out)

    def run(**changes):
        file.write_text(OWN.format(**{**RIGHT, **changes}))
        with pytest.raises(SystemExit) as done:
            cli.main(["paper", "--trials", "1", "--seeds", "1", *map(str, few)])
        del PEERS["own"]
        told = capsys.readouterr()
        return done.value.code, " ".join((told.out + told.err).split())

    def scores():
        cells = read_json(out / "summary.json")["cells"]
        return next(c["test_auc"] for c in cells if c["method"] == "own")

    code, told = run()
    assert code == 0 and "made again" not in told and "of the module" not in told
    before = scores()
    assert run()[0] == 0 and scores() == before
    code, told = run(embedded="self.look_up(self.weight, rows * 0)")
    assert code == 0 and "another one: made again" in told and scores() != before
    assert run()[0] == 0 and scores() == before
    page = (out / "paper.md").read_text()
    assert "--add own.py" in page and "its bytes are what parts() says" in page

    code, told = run(count="10")
    assert code == 0 and "40 bytes by parts(), which leaves" in told
    assert "numbers of its module out" in (out / "paper.md").read_text()

    code, told = run(embedded="self.weight[rows % len(self.weight), :3]")
    assert code == 1 and "own.py: ValueError: embed returned" in told and ", 16]" in told
    code, told = run(embedded="rows.nothing")
    assert code == 1 and "AttributeError" in told and "(line 12, in embed)" in told
    assert "Traceback" not in told and "worker died" not in told


@pytest.mark.parametrize(
    ("page", "summary"),
    [
        ("evidence.md", "2026-11-27-paper.json"),
        ("evidence-with-decay.md", "2026-11-29-students-dropout-paper.json"),
    ],
)
def test_a_page_of_the_documentation_is_that_of_its_summary(page, summary):
    expected = write_markdown(read_json(ROOT / "bench" / "results" / summary))
    assert (ROOT / "docs" / page).read_text() == expected


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc, which Linux has")
def test_a_killed_command_leaves_no_workers(tmp_path):
    endless = ("--sets", "", "--also", f"tiny={':'.join(SET)}", "--trials", "5000")
    command = [sys.executable, "-m", "amtl", "paper", *endless, "--jobs", "2"]
    started = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )

    def until(wanted):
        deadline = time.monotonic() + 180
        while not wanted():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    # The workers, and the tracker of what they share.
    until(lambda: len(children.read_text().split()) >= 3)
    workers = [Path("/proc", pid) for pid in children.read_text().split()]
    # Each has come as far as to watch.
    until(lambda: (tmp_path / "runs.jsonl").exists())
    started.kill()
    started.wait()
    until(lambda: not any(worker.exists() for worker in workers))
