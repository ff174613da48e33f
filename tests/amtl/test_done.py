"""A run that was stopped after its first model: what it had trained since is not trained again."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter

import pytest
import torch
from amtl.run import folders
from amtl.run.ahead import Ahead
from amtl.run.done import Done, Interrupted
from amtl.run.learner import Learner
from amtl.run.progress import Silent
from amtl.run.race import Trials, best_record
from amtl.run.training import start
from amtl.store.files import FileWriteError

from . import test_ahead
from .test_ahead import settings, without_times

source, task, one_thread = test_ahead.source, test_ahead.task, test_ahead.one_thread


class Steps:
    """Counts steps, and stops a run after so many."""

    def __init__(self, most=math.inf):
        self.taken, self.most = 0, most

    def __call__(self, steps):
        self.taken += 1
        return self.taken >= self.most


@pytest.fixture(scope="module")
def whole(source):
    torch.set_num_threads(1)
    steps = Steps()
    return without_times(start(settings(compare=True), source=source, stop=steps).run()), steps


def test_a_run_that_is_stopped_again_and_again_trains_what_it_trains_at_once(
    source, tmp_path, whole
):
    expected, steps = whole
    at_once, taken, raced = steps.taken, 0, 12 * (5 + 3 + 2 + 2)
    trainer = start(settings(compare=True), tmp_path, source=source, stop=Steps(at_once // 3))
    for _ in range(4):
        with pytest.raises(Interrupted):
            trainer.run()
        taken += trainer.stop.taken
        trainer = start(
            None, tmp_path, resume=True, source=source, stop=Steps(max(raced, at_once // 5))
        )
    trainer.stop.most = math.inf
    metrics = trainer.run()
    taken += trainer.stop.taken
    assert without_times(metrics) == {**expected, "config": metrics["config"]}
    assert taken == at_once
    assert not folders.trainings(tmp_path)


@pytest.mark.parametrize("jobs", [2, 3])
def test_side_by_side_it_ends_the_same(source, tmp_path, whole, jobs):
    expected, _ = whole

    def stop(steps):
        return len(folders.trainings(tmp_path)) > 5

    with pytest.raises(Interrupted):
        start(settings(compare=True), tmp_path, source=source, stop=stop, jobs=jobs).run()
    again = start(None, tmp_path, resume=True, source=source, jobs=jobs).run()
    assert without_times(again) == {**expected, "config": again["config"]}


def test_numbers_of_what_was_let_go_of_are_not_kept(task, tmp_path):
    done = Done(tmp_path, resumed=False)
    trials = Trials(lambda entry: Learner(entry, task), Silent(), Learner.step, done=done)
    entries = [settings(race=False, bits="4", embedding_decay=each) for each in (0.0, 1e-4, 1e-3)]
    learners = [trials.make(entry) for entry in entries]
    for learner in learners:
        trials.train(learner)
        if learner is learners[0]:
            logits, train = learner.says(), trials.says_of_train(learner)
            scores, state = best_record(learner), learner.state()
            learner.release()
    kept = [folders.load_training(tmp_path, name) for name in folders.trainings(tmp_path)]
    assert Counter("model" in each for each in kept if "logits" not in each) == {True: 2, False: 1}

    def unwanted(learner):
        raise AssertionError("a step")

    trials = Trials(
        lambda entry, taught=None: Learner(entry, task, taught=taught),
        Silent(),
        unwanted,
        done=Done(tmp_path, resumed=True),
    )
    again = [trials.make(entry) for entry in entries]
    for learner, other in zip(again, learners, strict=True):
        horizon = learner.lap_end(2)
        trials.train(learner, horizon)
        assert learner.steps == horizon and not learner.finished
        assert learner.history == [r for r in other.history if r["step"] <= horizon]
        trials.train(learner)
        assert learner.steps == other.steps and learner.finished
        assert learner.history == other.history
    assert again[0].released and not again[1].released
    assert best_record(again[0]) == scores
    torch.testing.assert_close(again[0].says(), logits, rtol=0, atol=0)
    torch.testing.assert_close(trials.says_of_train(again[0]), train, rtol=0, atol=0)
    torch.testing.assert_close(again[1].says(), learners[1].says(), rtol=0, atol=0)
    found = Trials(trials.fresh, Silent(), Learner.step, done=trials.done).whole(again[0])
    found.end()
    for name, value in state["best"]["model"].items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=0, atol=0)


def test_what_was_given_up_goes_on_from_its_start_where_it_is_asked_for(task, tmp_path):
    entry = settings(race=False, bits="4")
    alone = Learner(entry, task)
    Trials(None, Silent(), Learner.step).train(alone)

    def trials(done):
        return Trials(lambda entry: Learner(entry, task), Silent(), Learner.step, done=done)

    first = trials(Done(tmp_path, resumed=False))
    learner = first.make(entry)
    horizon = learner.lap_end(2)
    first.train(learner, horizon)
    scores = learner.history
    learner.release()
    again = trials(Done(tmp_path, resumed=True))
    learner = again.make(entry)
    again.train(learner, horizon)
    assert learner.steps == horizon and learner.history == scores and not learner.finished
    again.train(learner)
    assert learner.history == [
        {**r, "seconds": learner.history[i]["seconds"]} for i, r in enumerate(alone.history)
    ]
    torch.testing.assert_close(learner.says(), alone.says(), rtol=0, atol=0)


def test_what_nobody_needs_is_not_held(task, tmp_path):
    done = Done(tmp_path, resumed=False)
    trials = Trials(lambda entry: Learner(entry, task), Silent(), Learner.step, done=done)
    learner = trials.make(settings(race=False, bits="4", epochs=1))
    trials.train(learner)
    gone = weakref.ref(learner)
    del learner
    gc.collect()
    assert gone() is None and len(folders.trainings(tmp_path)) == 1


def test_one_that_was_stopped_goes_on_from_there(task, tmp_path):
    entry = settings(race=False, bits="4", embedding_dropout=0.2)
    alone = Learner(entry, task)
    Trials(None, Silent(), Learner.step).train(alone)

    def stopping(learner):
        learner.step()
        if learner.steps == 17:
            raise Interrupted

    done = Done(tmp_path, resumed=False)
    with pytest.raises(Interrupted):
        Trials(None, Silent(), stopping, done=done).train(Learner(entry, task))
    seen = []

    def counted(learner):
        seen.append(learner.steps)
        learner.step()

    torch.manual_seed(5)
    resumed = Learner(entry, task)
    Trials(None, Silent(), counted, done=Done(tmp_path, resumed=True)).train(resumed)
    assert seen[0] == 17 and resumed.steps == alone.steps
    torch.testing.assert_close(resumed.says(), alone.says(), rtol=0, atol=0)


def test_one_that_was_stopped_in_a_process_of_its_own_goes_on_here(task, tmp_path):
    entry = settings(race=False, bits="4", embedding_dropout=0.2, epochs=12)
    alone = Learner(entry, task)
    Trials(None, Silent(), Learner.step).train(alone)

    def make(config, taught=None):
        return Learner(config, task, taught=taught)

    def tell(*told):
        raise Interrupted

    done, there = Done(tmp_path, resumed=False), Ahead(make, 2)
    side = Trials(make, Silent(), Learner.step, ahead=there, tell=tell, done=done)
    with there:
        side.expect(entry)
        there.tend(0, 0.01)
        torch.manual_seed(5)
        with pytest.raises(Interrupted):
            side.train(side.make(entry))
    resumed = Learner(entry, task)
    done = Done(tmp_path, resumed=True)
    assert len(done) == 1
    Trials(make, Silent(), Learner.step, done=done).train(resumed)
    assert resumed.history[-1]["step"] == alone.history[-1]["step"]
    torch.testing.assert_close(resumed.says(), alone.says(), rtol=0, atol=0)


def test_other_settings_and_other_labels_are_other_trainings(task, tmp_path):
    entry = settings(race=False, bits="4", epochs=1)
    labels = torch.rand(len(task.train))
    taught = settings(race=False, bits="4", epochs=1, distillation=0.5)
    trials = Trials(
        lambda config, taught=None: Learner(config, task, taught=taught),
        Silent(),
        Learner.step,
        done=Done(tmp_path, resumed=False),
    )
    trials.train(trials.make(entry))
    trials.taught(labels).train(trials.taught(labels).make(taught))
    done = Done(tmp_path, resumed=True)
    assert len(done) == 2
    assert done.has(entry, None) and done.has(taught, labels.clone())
    assert not done.has(settings(race=False, bits="4", epochs=2), None)
    assert not done.has(taught, 1 - labels) and not done.has(taught, None)


def test_what_is_damaged_is_trained_again(source, tmp_path, whole):
    expected, steps = whole
    with pytest.raises(Interrupted):
        stop = Steps(int(0.6 * steps.taken))
        start(settings(compare=True), tmp_path, source=source, stop=stop).run()
    damaged = 0
    for path in (tmp_path / "trained").glob("*.safetensors"):
        if path.stem not in ("first", "full") and not path.stem.endswith("-says"):
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(bytes(content))
            damaged += 1
    assert damaged
    again = start(None, tmp_path, resume=True, source=source).run()
    assert without_times(again) == {**expected, "config": again["config"]}


def test_a_full_disk_ends_no_run(source, tmp_path, whole, monkeypatch):
    expected, tried = whole[0], []

    def full(folder, name, state):
        tried.append(name)
        raise FileWriteError("no space left")

    monkeypatch.setattr(folders, "save_training", full)
    metrics = start(settings(compare=True), tmp_path, source=source).run()
    assert tried and without_times(metrics) == {**expected, "config": metrics["config"]}


def test_a_run_in_its_place_has_nothing_of_it(source, tmp_path, whole):
    _, steps = whole
    with pytest.raises(Interrupted):
        start(settings(), tmp_path, source=source, stop=Steps(int(0.4 * steps.taken))).run()
    assert folders.trainings(tmp_path)
    with pytest.raises(Interrupted):
        start(settings(seed=4), tmp_path, source=source, stop=Steps(3)).run()
    assert not folders.trainings(tmp_path)
