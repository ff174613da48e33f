"""Run folders and packed runs: round trips, replacing one, and files of version 1."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import amtl
import polars as pl
import pytest
import torch
from amtl.cli import main
from amtl.data.registry import load_source
from amtl.errors import UserError
from amtl.run import folders
from amtl.run.config import TrainConfig
from amtl.run.done import Interrupted
from amtl.run.trained import Trained
from amtl.run.training import start
from amtl.store import files
from amtl.store.files import FileWriteError, write_aside
from amtl.store.tensors import document_writer, read_document
from torch import nn

FIELDS = ["shop", "city", "hour", "truth"]


def settings(**changes) -> TrainConfig:
    base = {
        "data": "synthetic:300",
        "label": "label",
        "fields": FIELDS,
        "dim": 4,
        "budget": 0.5,
        "hidden": [4],
        "epochs": 4,
        "batch_size": 80,
    }
    return TrainConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    start(settings(), folder).run()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return int(stop.value.code or 0)


TRAIN = ["train", "synthetic:300", "--fields", ",".join(FIELDS), "--dim", "4", "--epochs", "2"]


# One format, one reader


def test_a_packed_run_is_a_packed_file(run, tmp_path):
    path = tmp_path / "model.safetensors"
    folders.pack_run(run, path)
    frame = load_source("synthetic:300").frame
    trained = amtl.load(run)
    expected = trained.probabilities(frame)
    packed = amtl.load(path)
    assert isinstance(trained, Trained) and isinstance(packed, Trained)
    assert torch.equal(packed.probabilities(frame), expected)
    assert packed.config == trained.config
    assert packed.metrics["test_auc"] == trained.metrics["test_auc"]
    opened = amtl.open_packed(path)
    assert opened.kind == "run" and list(opened.layers) == ["table"]
    batch = first_batch(trained, frame)
    filled = amtl.load(path, amtl.load(run).model)
    assert torch.equal(filled(batch), trained.model(batch))


def test_packed_runs_of_older_versions_open(run, tmp_path):
    """Which have their metadata in the header, and numbers beside the table in floats."""
    path, older = tmp_path / "model.safetensors", tmp_path / "older.safetensors"
    folders.pack_run(run, path)
    opened = amtl.open_packed(path)
    contents, _, version, header = read_document(path, {"amtl-packed": 3})
    tensors = {k: v for k, v in contents.items() if k.startswith(("layers/", "user/"))}
    tensors |= {f"state/{key}": value for key, value in opened.state.items()}
    header["metadata"] = opened.metadata
    write_aside({older: document_writer("amtl-packed", 1, tensors, header)})
    assert version == 3 and older.stat().st_size > path.stat().st_size
    frame = load_source("synthetic:300").frame
    found, expected = amtl.load(older), amtl.load(path)
    assert torch.equal(found.probabilities(frame), expected.probabilities(frame))
    assert found.metrics == expected.metrics


def test_a_packed_table_of_full_size_is_all_of_itself(tmp_path, capsys):
    assert command(*TRAIN, "--label", "label", "--method", "fixed", "--out", tmp_path / "r") == 0
    path = tmp_path / "model.safetensors"
    for args in (("pack", tmp_path / "r", "-o", path), ("inspect", path)):
        capsys.readouterr()
        assert command(*args) == 0
        assert "100.0%" in capsys.readouterr().out
    assert amtl.open_packed(path).layers["table"].stored_fraction() == 1


def first_batch(trained, frame):
    return next(trained.encoder.transform(frame).batches(50))


def test_a_model_saved_by_hand_and_a_run_open_with_the_same_call(run, tmp_path):
    trained = amtl.load(run)
    amtl.save(trained.model, tmp_path / "by-hand")
    fresh = amtl.load(run).model
    nn.init.zeros_(fresh.mlp[0].weight)
    amtl.load(tmp_path / "by-hand", fresh)
    batch = first_batch(trained, load_source("synthetic:300").frame)
    assert torch.equal(fresh(batch), trained.model(batch))
    assert command("evaluate", tmp_path / "by-hand") == 1, "it has no vocabularies"
    with pytest.raises(UserError, match="is a run folder"):
        amtl.load(run, fresh)


def test_vocabularies_are_stored_compactly(run):
    encoder = folders.load_inputs(run)[1]
    whole = sum(t.nbytes for t in encoder.to_tensors()[0].values())
    packed = sum(t.nbytes for t in folders.compact(encoder.to_tensors()[0])[0].values())
    assert packed < 0.55 * whole


def test_vocabularies_are_deflated_no_more_than_it_takes(tmp_path, monkeypatch):
    thoroughly = []
    compact = folders.compact

    def watched(tensors, quickly=False):
        thoroughly.append(not quickly)
        return compact(tensors, quickly)

    monkeypatch.setattr(folders, "compact", watched)
    start(settings(epochs=1), tmp_path / "run").run()
    assert thoroughly.count(True) == 1 and thoroughly[-1], "of a packed file, once, at the end"


# Replacing a run


def test_force_keeps_the_old_run_until_the_new_one_has_started(run, monkeypatch, capsys):
    before = contents(run)
    assert command(*TRAIN, "--out", run) == 1
    assert "--force replaces it" in capsys.readouterr().err
    for wrong in (["--fields", "colour"], ["--table-optimizer", "x"], ["--budget", "7"]):
        assert command(*TRAIN, *wrong, "--out", run, "--force") == 1
    assert contents(run) == before

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert command(*TRAIN, "--out", run, "--force") == 1
    assert "free some space" in capsys.readouterr().err
    assert contents(run) == before
    assert command(*TRAIN, "--out", run, "--force") == 0
    after = contents(run)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before if name != "vocabulary.safetensors")


@pytest.mark.parametrize("name", ["metrics.json", "best.pt", "config.json"])
def test_a_folder_where_a_file_of_the_old_run_was_leaves_that_run_alone(run, name, capsys):
    before = contents(run)
    (run / name).unlink(missing_ok=True)
    (run / name / "inside").mkdir(parents=True)
    assert command(*TRAIN, "--out", run, "--force") == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{name}: a folder is in the way" in told
    (run / name / "inside").rmdir()
    (run / name).rmdir()
    assert {**before, **contents(run)} == before and len(contents(run)) == len(before) - (
        name in before
    )


@pytest.mark.parametrize("name", ["best.safetensors", "metrics.json"])
def test_what_is_made_of_a_run_does_not_take_the_place_of_its_files(run, name, capsys):
    before = contents(run)
    for made in ("pack", "report"):
        assert command(made, run, "-o", run / name) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"{name} is a part of the run" in told
    assert contents(run) == before


def test_a_new_run_leaves_nothing_of_the_old_one(run):
    trainer = start(settings(seed=7, race=False, validations=1), run, stop=lambda steps: steps >= 1)
    with pytest.raises(Interrupted):
        trainer.run()
    assert contents(run).keys() == {
        "config.json",
        "vocabulary.safetensors",
        "checkpoint.safetensors",
    }
    assert folders.load_inputs(run)[0].seed == 7
    with pytest.raises(UserError, match="no trained model yet"):
        amtl.load(run)


# Failing disks


@pytest.mark.parametrize("name", ["checkpoint", "best"])
def test_a_failed_checkpoint_leaves_the_old_one(run, monkeypatch, name):
    before = contents(run)
    state = folders.load_checkpoint(run, name)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FileWriteError, match=f"{name}.safetensors: No space left"):
        folders.save_checkpoint(run, name, {**state, "epoch": 99})
    assert contents(run) == before


LIMITED = """
import resource, signal, sys
from amtl.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
main(sys.argv[1:])
"""


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "args",
    [
        [*TRAIN, "--out", "RUN", "--force"],
        ["train", "--resume", "--out", "RUN"],
        ["pack", "RUN", "-o", "OUT/model.safetensors"],
        ["report", "RUN", "-o", "OUT/report.html"],
        ["demo", "--data", "synthetic:300", "--epochs", "1", "--out", "NEW"],
        ["paper", "--quick", "--out", "NEW"],
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(run, tmp_path, args):
    # Importing it writes its list of fonts, the first time on a machine, and warns if it can't.
    importlib.import_module("matplotlib.font_manager")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    (out / "report.html").write_text("old")
    before = {**contents(run), **contents(out)}
    for name, path in {"RUN": run, "OUT": out, "NEW": tmp_path / "new"}.items():
        args = [a.replace(name, str(path)) for a in args]
    # -B: Python before 3.11.4 leaves half of a compiled module where the disk is full.
    command = [sys.executable, "-B", "-c", LIMITED, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1
    assert "free some space" in done.stderr
    assert {**contents(run), **contents(out)} == before


@pytest.mark.parametrize(
    "args",
    [
        ["pack", "RUN", "-o", "OUT"],
        ["report", "RUN", "-o", "OUT"],
        ["pack", "RUN", "-o", "FILE/x"],
        [*TRAIN, "--out", "FILE"],
        ["evaluate", "OUT"],
        ["inspect", "FILE"],
    ],
)
def test_something_in_the_way_is_one_line(run, tmp_path, args, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("old")
    names = {"RUN": run, "OUT": tmp_path / "out", "FILE": tmp_path / "file"}
    for name, path in names.items():
        args = [str(a).replace(name, str(path)) for a in args]
    assert command(*args) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert (tmp_path / "file").read_text() == "old" and not os.listdir(tmp_path / "out")


# Files of version 1


def test_runs_and_packed_files_of_version_1_open(v1, tmp_path):
    expected = json.loads((v1 / "expected.json").read_text())
    frame = pl.DataFrame(expected["rows"])
    for name, key in (
        ("finished", "packed"),
        ("packed.safetensors", "packed"),
        ("fixed.safetensors", "fixed"),
    ):
        trained = amtl.load(v1 / name)
        torch.testing.assert_close(trained.probabilities(frame), torch.tensor(expected[key]))
        assert command("evaluate", v1 / name) == command("inspect", v1 / name) == 0
    assert amtl.open_packed(v1 / "packed.safetensors").kind == "run"
    packed = folders.pack_run(v1 / "finished", tmp_path / "new.safetensors")
    torch.testing.assert_close(packed.probabilities(frame), torch.tensor(expected["packed"]))
    assert packed.metrics["test_auc"] == expected["test_auc"]
    old = (v1 / "packed.safetensors").stat().st_size
    assert (tmp_path / "new.safetensors").stat().st_size < old


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 4)
        self.top = nn.Linear(4, 1)

    def forward(self, rows):
        return self.top(self.table(rows))


def test_models_of_version_1_open(v1):
    expected = json.loads((v1 / "expected.json").read_text())["model"]
    model = amtl.load(v1 / "model.safetensors", Model().eval())
    torch.testing.assert_close(model(torch.arange(30)).flatten(), torch.tensor(expected))
    packed = amtl.open_packed(v1 / "model.safetensors")
    assert packed.metadata == {"who": "me"}
    assert packed.tensors["extra"].tolist() == list(range(5))


def test_training_of_version_1_cannot_go_on_but_starts_anew(v1, tmp_path):
    run = Path(shutil.copytree(v1 / "stopped", tmp_path / "run"))
    assert folders.holds_run(run) and (run / "checkpoint.pt").exists()
    with pytest.raises(UserError, match="begun by an older version"):
        start(None, run, resume=True)
    assert (run / "checkpoint.pt").exists()
    with pytest.raises(Interrupted):
        start(settings(race=False), run, stop=lambda steps: steps >= 1).run()
    assert not list(run.glob("*.pt")), "the new files took their place"
