"""The race and what follows it, with learners whose scores are written down beforehand."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from amtl.errors import UserError
from amtl.run import contenders, contest
from amtl.run.ahead import Ahead
from amtl.run.config import TrainConfig
from amtl.run.contenders import (
    DECAY,
    DROPOUT,
    LESS,
    SHARES,
    race_bytes,
    race_law,
    race_taught,
)
from amtl.run.contest import Contest
from amtl.run.metrics import score_error
from amtl.run.progress import Silent
from amtl.run.race import FLAT, FULL, Trials, race


def settings(**changes) -> TrainConfig:
    base = {"data": "", "label": "label", "dim": 8, "budget": 0.25, "epochs": 4, "bits": "32"}
    base["embedding_decay"] = 0.0
    return TrainConfig(**{**base, **changes})


class Scripted:
    """A learner whose best score by epoch is written down."""

    steps_per_epoch = 4
    rng = torch.get_rng_state()
    may_hide = False

    def __init__(self, scores, auc=None):
        self.auc = auc
        self.scores, self.steps, self.finished, self.released = scores, 0, False, False
        self.history = []
        self.config = settings()

    @property
    def epochs(self):
        return self.steps / self.steps_per_epoch

    @property
    def best(self):
        if not self.history:
            return None
        return {"record": max(self.history, key=lambda r: r["score"])}

    def lap_end(self, laps):
        return laps * self.steps_per_epoch

    def step(self):
        self.steps += 1
        if self.steps % self.steps_per_epoch == 0:
            score = self.scores[self.steps // self.steps_per_epoch - 1]
            area = score if self.auc is None else self.auc
            record = {"score": score, "val_auc": area, "val_logloss": 0.0, "stored_bytes": 1}
            self.history.append({**record, "step": self.steps, "seconds": 0.0})
            self.finished = self.steps == len(self.scores) * self.steps_per_epoch

    def release(self):
        self.released = True

    def says(self):
        """All learners the same, so that no difference is in doubt, or by how much it is."""
        return self.said

    said = torch.zeros(8)
    task = SimpleNamespace(val=SimpleNamespace(labels=torch.tensor([0.0, 1.0] * 4), weights=None))


def step(learner):
    learner.step()


def trials(make, **more):
    return Trials(make, Silent(), step, **more)


def scripted_race(scores, config):
    made = {}

    def make(entry):
        bits = entry.table_options.get("capacity_bits")
        name = FULL if entry.method == "fixed" else FLAT if bits > 100 else bits
        made[name] = Scripted(scores[name])
        return made[name]

    return race(config, trials(make)), made


def test_the_better_half_goes_on_and_the_best_one_wins():
    scores = {
        FULL: [0.9, 0.9],
        FLAT: [0.1, 0.9],
        16.0: [0.4, 0.6],
        4.0: [0.5, 0.4],
        1.0: [0.2, 0.9],
    }
    result, made = scripted_race(scores, settings(method="rule"))
    assert result.learner is made[16.0]
    assert result.config.table_options["capacity_bits"] == 16.0 and not result.config.race
    assert [learner.steps for learner in made.values()] == [8, 8, 8, 4, 4]
    assert [made[name].released for name in (FULL, FLAT, 1.0, 4.0, 16.0)] == [
        *(True, True, True, True, False)
    ]
    names = [row["name"].split()[0] for row in result.table]
    assert names == ["full", "16", "4", "1", "fixed"]
    assert [row["name"] for row in result.table if row["chosen"]] == ["16 bits a number"]


def test_where_a_fixed_width_wins_less_is_tried_with_sizes():
    scores = {
        FULL: [0.9, 0.9],
        FLAT: [0.9, 0.9],
        16.0: [0.1, 0.1],
        4.0: [0.5, 0.4],
        1.0: [0.2, 0.9],
    }
    result, made = scripted_race(scores, settings(method="rule"))
    assert result.learner is made[FLAT]
    assert result.sized.table_options["capacity_bits"] == 4.0


@pytest.mark.parametrize(
    ("scores", "auc", "steps", "better"),
    [
        ([0.5, 0.6, 0.9], None, 12, True),
        ([0.5, 0.6, 0.7], None, 12, False),
        ([0.1, 0.2, 0.9], None, 8, False),
        ([0.5, 0.58, 0.9], None, 12, True),
        ([0.5, 0.6, 0.9], 0.79, 12, False),
    ],
)
def test_a_part_of_the_budget_is_taken_where_it_does_better(scores, auc, steps, better):
    winner = Scripted([0.5, 0.6, 0.8])
    while not winner.finished:
        winner.step()
    small = Scripted(scores, auc)
    made = []

    def make(config):
        if made:
            raise UserError("no size is smaller")
        made.append(config)
        return small

    result, row = race_bytes(settings(), winner, 0.25, trials(make))
    assert small.steps == steps
    assert result is (small if better else None)
    assert made[0].budget == pytest.approx(0.075)
    assert row["chosen"] == better


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({0.5: [0.5, 0.6, 0.9], 0.8: [0.5, 0.6, 0.95]}, 0.8),
        ({0.5: [0.5, 0.6, 0.9], 0.8: [0.5, 0.6, 0.85]}, 0.5),
        ({0.5: [0.5, 0.6, 0.7], 0.8: [0.1, 0.2, 0.9]}, None),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_teacher_is_heard_where_it_does_better(scores, chosen, dropout):
    winner = Scripted([0.5, 0.6, 0.8])
    winner.config = settings(seed=11, embedding_dropout=dropout)
    while not winner.finished:
        winner.step()
    made = {}

    def make(config):
        assert config == dataclasses.replace(
            winner.config,
            distillation=config.distillation,
            embedding_dropout=dropout,
        )
        made[config.distillation] = Scripted(scores[config.distillation])
        return made[config.distillation]

    best, rows = race_taught(winner, trials(make))
    assert tuple(made) == SHARES
    assert best is made.get(chosen)
    assert [row["chosen"] for row in rows] == [share == chosen for share in SHARES]
    assert [learner.released for learner in made.values()] == [s != chosen for s in SHARES]
    # Hopelessly behind after two epochs.
    assert made[0.8].steps == (8 if scores[0.8][0] == 0.1 else 12)


@pytest.mark.parametrize(("decay", "won"), [(0.0, False), (1e-5, False), (1e-4, True)])
def test_more_weight_decay_has_its_time(decay, won):
    """It learns more slowly, and for longer."""
    winner, slow = Scripted([0.5, 0.6, 0.8]), Scripted([0.1, 0.1, 0.9])
    winner.config = settings(embedding_decay=1e-5)
    slow.config = settings(embedding_decay=decay)
    while not winner.finished:
        winner.step()
    better, _ = contenders.contend("slow", slow, winner, trials(pytest.fail))
    assert (better is slow) == won and slow.finished == won


# What two models say of eight samples: they differ in two, and so in AUC by .0625 +- .0884.
SAID = torch.tensor([-2.0, 1.0, -1.0, 2.0, -3.0, 3.0, -0.5, 4.0])
OTHERWISE = SAID.index_fill(0, torch.tensor([6]), 1.5)


@pytest.mark.parametrize(
    ("score", "auc", "sure", "chosen"),
    [
        (0.9, None, 0.0, True),
        (0.9, None, 1.0, False),
        (2.0, None, 1.0, True),
        (0.79, None, 0.0, False),
        (0.79, None, -1.0, True),
        (0.9, 0.1, 0.0, False),
        (0.79, 0.1, -1.0, True),
        (-0.2, None, -1.0, False),
    ],
)
def test_luck_on_few_samples_is_allowed_for(score, auc, sure, chosen):
    winner, other = Scripted([0.5, 0.8]), Scripted([0.5, score], auc)
    winner.said, other.said = SAID, OTHERWISE
    labels = winner.task.val.labels
    doubt = score_error(SAID, OTHERWISE, labels)
    assert 0.11 < doubt < 0.9
    while not winner.finished:
        winner.step()
    better, row = contenders.contend("other", other, winner, trials(pytest.fail), sure)
    assert row["chosen"] == chosen and better is (other if chosen else None)


@pytest.mark.parametrize(
    ("seconds", "jobs", "told"),
    [(5.0, 1, []), (120.0, 1, ["16 to 50 minutes more"]), (120.0, 4, ["7 to 22 minutes more"])],
)
def test_what_follows_a_long_training_is_announced(seconds, jobs, told):
    first, notes = Scripted([0.5, 0.8]), []
    while not first.finished:
        first.step()
    first.history[1]["seconds"] = seconds
    observer = Silent()
    observer.note = notes.append
    ahead = None if jobs == 1 else Ahead(pytest.fail, jobs)
    Contest(first, Trials(pytest.fail, observer, step, ahead=ahead))._announce()
    assert len(notes) == len(told) and all(t in note for t, note in zip(told, notes, strict=True))


@pytest.mark.parametrize(("score", "better"), [(0.85, False), (1.9, True)])
def test_fewer_bytes_need_more_than_luck(score, better):
    winner, small = Scripted([0.5, 0.8]), Scripted([0.5, score])
    winner.said, small.said = SAID, OTHERWISE
    while not winner.finished:
        winner.step()
    sizes = iter([small])

    def make(config):
        found = next(sizes, None)
        if found is None:
            raise UserError("no size is smaller")
        return found

    best, row = race_bytes(settings(), winner, 0.25, trials(make))
    assert best is (small if better else None) and row["chosen"] == better


def test_all_bytes_with_a_teacher_need_not_do_better_than_a_lucky_few():
    winner = Scripted([0.5, 0.8])
    winner.config = settings(embedding_dropout=DROPOUT)
    winner.said = SAID
    while not winner.finished:
        winner.step()
    scores = iter([0.75, 0.76])

    def make(config):
        learner = Scripted([0.5, next(scores)])
        learner.said = OTHERWISE
        return learner

    best, rows = race_taught(winner, trials(make), sure=-1.0)
    # The second is held against the first, no more against the winner.
    assert best_score(best) == 0.76 and [row["chosen"] for row in rows] == [False, True]
    scores = iter([0.75, 0.76])
    assert race_taught(winner, trials(make))[0] is None


def best_score(learner):
    return learner.best["record"]["score"]


def test_less_is_tried_as_long_as_it_is_better():
    winner = Scripted([0.5, 0.8])
    while not winner.finished:
        winner.step()
    tried = [Scripted([0.5, score]) for score in (0.795, 0.85, 0.845, 0.843, 0.99)]
    made = []

    def make(config):
        made.append(config.budget)
        return tried[len(made) - 1]

    best, row = race_bytes(settings(), winner, 0.25, trials(make))
    assert best is tried[1] and row["score"] == 0.85 and row["chosen"]
    assert row["name"] == "2.2% of the bytes" and row["rival"]["score"] == 0.8
    assert made == pytest.approx([0.075, 0.0225, 0.00675, 0.002025])
    assert [learner.released for learner in tried] == [True, False, True, True, False]


def test_the_middle_law_is_tried_where_another_has_won():
    winner, made = Scripted([0.5, 0.8]), []
    while not winner.finished:
        winner.step()

    def tried(score, law=None, **changes):
        made.clear()
        options = changes["table_options"]
        winner.config = settings(table_options=options if law is None else {"capacity_bits": law})

        def make(config):
            made.append(config)
            return Scripted([0.5, score])

        return race_law(settings(**changes), winner, trials(make))

    options = {"capacity_bits": 16.0, "twins": False}
    better, row = tried(0.9, table_options=options, distillation=0.5)
    assert better is not None and row["chosen"]
    assert made == [settings(table_options={**options, "capacity_bits": 4.0}, distillation=0.5)]
    assert tried(0.7, table_options=options)[0] is None
    # A fixed width has won, and the best of those whose rows differ has the middle law.
    options["capacity_bits"] = 4.0
    better, _ = tried(0.9, law=1e4, table_options=options)
    assert better is not None and made == [settings(table_options=options)]
    for changes in (
        {"table_options": {"capacity_bits": 4.0}},
        {"table_options": {}},
        {"table_options": {"capacity_bits": 1.0, "bits": 4}, "budget": 0.125},
    ):
        assert tried(0.9, **changes) == (None, None) and not made


@pytest.mark.parametrize(
    ("asked", "scores", "winner"),
    [
        # By law and share: a law that wins is taught by the other share, too.
        (None, {(4.0, 0.8): 0.9, (4.0, 0.5): 0.95}, (4.0, 0.5)),
        (None, {(4.0, 0.8): 0.9, (4.0, 0.5): 0.85}, (4.0, 0.8)),
        # It does not win, or the share is the user's.
        (None, {(4.0, 0.8): 0.7}, (16.0, 0.8)),
        (0.8, {(4.0, 0.8): 0.9}, (4.0, 0.8)),
    ],
)
def test_a_law_that_wins_is_taught_by_the_other_share(asked, scores, winner):
    tried = {}

    def make(config, taught=None):
        key = (config.table_options["capacity_bits"], config.distillation)
        assert taught is labels and key not in tried
        tried[key] = Scripted([0.5, scores[key]])
        tried[key].config = config
        return tried[key]

    labels = torch.ones(3)
    first = Scripted([0.5, 0.6])
    first.config = settings(distillation=asked)
    course = Contest(first, trials(make))
    course.winner = tried[16.0, 0.8] = Scripted([0.5, 0.8])
    options = {"capacity_bits": 16.0}
    course.winner.config = settings(distillation=0.8, table_options=options, embedding_dropout=0.1)
    while not course.winner.finished:
        course.winner.step()
    settled = course._law({"given": {}}, options, labels)
    assert list(tried)[1:] == list(scores)
    assert course.winner is tried[winner] and settled["capacity_bits"] == winner[0]
    assert [learner.released for learner in tried.values()] == [k != winner for k in tried]
    again = ["50% of the labels a teacher's, 4 bits a number"] if len(scores) == 2 else []
    assert [row["name"] for row in course.found["taught"]] == again


@pytest.mark.parametrize(
    ("weaker", "scores", "made", "chosen"),
    [
        # By how much of the budget is left, and the decay: the winner's is .8, with 1e-5.
        (False, {(1, 1e-5): 0.79, (2, 1e-5): 0.79}, [(1, 1e-5), (2, 1e-5)], None),
        # Weaker is better: the next one has that alone.
        (
            True,
            {(1, 1e-5): 0.795, (1, 1e-6): 0.799, (2, 1e-6): 0.9, (3, 1e-6): 0.7},
            [(1, 1e-5), (1, 1e-6), (2, 1e-6), (3, 1e-6)],
            (2, 1e-6),
        ),
        # It is not: the next one is tried with both again.
        (
            True,
            {(1, 1e-5): 0.9, (1, 1e-6): 0.85, (2, 1e-5): 0.895, (2, 1e-6): 0.91, (3, 1e-6): 0.5},
            [(1, 1e-5), (1, 1e-6), (2, 1e-5), (2, 1e-6), (3, 1e-6)],
            (2, 1e-6),
        ),
        # Far behind, it is not asked.
        (True, {(1, 1e-5): 0.7}, [(1, 1e-5)], None),
    ],
)
def test_fewer_bytes_are_tried_with_less_decay(weaker, scores, made, chosen):
    winner, found = Scripted([0.5, 0.8]), {}
    winner.config = settings(embedding_decay=1e-5)
    while not winner.finished:
        winner.step()

    def make(config):
        key = (round(math.log(config.budget / 0.25, LESS)), float(f"{config.embedding_decay:g}"))
        found[key] = Scripted([0.5, scores[key]])
        return found[key]

    best, row = race_bytes(winner.config, winner, 0.25, trials(make), weaker)
    assert list(found) == made
    assert best is (found[chosen] if chosen else None) and row["chosen"] == bool(chosen)
    assert [key for key, learner in found.items() if not learner.released] == (
        [chosen] if chosen else []
    )
    if chosen and chosen[1] == 1e-6:
        assert row["name"].endswith("of the bytes, weight decay 1e-06")


def test_a_better_score_alone_takes_no_place_from_what_is_better():
    winner = Scripted([0.5, 0.8])
    winner.config = settings(embedding_decay=1e-5)
    while not winner.finished:
        winner.step()
    # With weaker decay: ahead in the score, behind the winner in AUC.
    tried = [Scripted([0.5, 0.85]), Scripted([0.5, 0.86], auc=0.7), Scripted([0.5, 0.6])]
    made = iter(tried)
    best, row = race_bytes(winner.config, winner, 0.25, trials(lambda config: next(made)), True)
    assert best is tried[0] and row["score"] == 0.85 and row["chosen"]
    assert [learner.released for learner in tried] == [False, True, True]


def test_what_is_far_behind_ends_the_search_for_less():
    winner = Scripted([0.5, 0.8])
    while not winner.finished:
        winner.step()
    tried = [Scripted([0.5, 0.78]), Scripted([0.5, 0.99])]
    made = []

    def make(config):
        made.append(config)
        return tried[len(made) - 1]

    best, row = race_bytes(settings(), winner, 0.25, trials(make))
    assert best is None and row["score"] == 0.78 and len(made) == 1


def test_a_table_that_stores_nothing_leaves_nothing_out():
    winner = Scripted([0.8])
    step(winner)
    assert race_bytes(settings(), winner, 0.0, trials(pytest.fail)) == (None, None)


@pytest.mark.parametrize(
    ("sized", "given", "better", "tried", "settled"),
    [
        # What `better` says of fewer bytes by each law, and by which law sizes then follow.
        ({"capacity_bits": 16.0}, {}, {16.0: True}, [16.0], 16.0),
        ({"capacity_bits": 16.0}, {}, {16.0: False, 4.0: True}, [16.0, 4.0], 4.0),
        ({"capacity_bits": 1.0}, {}, {1.0: False, 4.0: False}, [1.0, 4.0], 1.0),
        ({"capacity_bits": 4.0}, {}, {4.0: False}, [4.0], 4.0),
        ({"capacity_bits": 16.0}, {"capacity_bits": 16.0}, {16.0: False}, [16.0], 16.0),
        ({"init_exponent": 1.0}, {"init_exponent": 1.0}, {None: False}, [None], None),
    ],
)
def test_fewer_bytes_get_a_second_law(monkeypatch, sized, given, better, tried, settled):
    first = Scripted([0.5, 0.8])
    first.table = None
    first.config = settings(bits="auto", table_options=sized)
    while not first.finished:
        first.step()
    made = []

    def make(config, taught):
        assert taught is labels and config.budget == pytest.approx(LESS / 100)
        law = config.table_options.get("capacity_bits")
        assert config.table_options == {**sized, **({"capacity_bits": law} if law else {})}
        made.append((law, Scripted([0.5, 0.9 if better[law] else 0.6])))
        made[-1][1].config, made[-1][1].table = config, None
        return made[-1][1]

    def one_size(sized, winner, used, trials, weaker):
        learner = trials.make(dataclasses.replace(sized, budget=used * LESS))
        return contenders.contend("less", learner, winner, trials)

    labels = torch.ones(3)
    monkeypatch.setattr(contest.methods, "dense_bytes", lambda table: 100)
    monkeypatch.setattr(contest, "race_bytes", one_size)
    course = Contest(first, trials(make))
    raced = {"given": given, "budget": 0.25}
    options = course._fewer_bytes("less", raced, sized, labels)
    assert [law for law, _ in made] == tried
    assert options.get("capacity_bits") == settled
    won = [learner for law, learner in made if better[law]]
    assert course.winner is (won[0] if won else first)
    assert course.found["less"]["chosen"] == bool(won)


P = DROPOUT
FULLY, WEAK, NONE = (1e-5, 0.0), (1e-6, P), (None, P)


@pytest.mark.parametrize(
    ("decay", "scores", "chosen"),
    [
        # Scores by decay, dropout and share, in the order in which they are asked for.
        (None, {(*NONE, 0.5): 0.7, (*NONE, 0.8): 0.6, (None, 0, 0.5): 0.65}, 0),
        (None, {(*NONE, 0.5): 0.7, (*NONE, 0.8): 0.75, (None, 0, 0.8): 0.8}, 2),
        # The full table's own serves more than a tenth: none is tried later.
        (
            1e-5,
            {
                (*FULLY, 0.5): 0.7,
                (*WEAK, 0.5): 0.6,
                (*FULLY, 0.8): 0.4,
                (*NONE, 0.5): 0.65,
                (1e-5, P, 0.5): 0.6,
            },
            0,
        ),
        (
            1e-5,
            {
                (*FULLY, 0.5): 0.7,
                (*WEAK, 0.5): 0.6,
                (*FULLY, 0.8): 0.8,
                (*NONE, 0.8): 0.75,
                (1e-5, P, 0.8): 0.9,
            },
            4,
        ),
        (
            1e-5,
            {
                (*FULLY, 0.5): 0.7,
                (*WEAK, 0.5): 0.6,
                (*FULLY, 0.8): 0.8,
                (*NONE, 0.8): 0.85,
                (None, 0, 0.8): 0.84,
            },
            3,
        ),
        (
            1e-5,
            {
                (*FULLY, 0.5): 0.6,
                (*WEAK, 0.5): 0.7,
                (*NONE, 0.5): 0.65,
                (*WEAK, 0.8): 0.72,
                (1e-6, 0, 0.8): 0.71,
            },
            3,
        ),
        (
            1e-5,
            {
                (*FULLY, 0.5): 0.6,
                (*WEAK, 0.5): 0.65,
                (*NONE, 0.5): 0.7,
                (*NONE, 0.8): 0.6,
                (None, 0, 0.5): 0.71,
            },
            4,
        ),
    ],
)
def test_students_get_the_decay_and_the_dropout_that_serve_them(decay, scores, chosen):
    winner, made = Scripted([0.5, 0.5]), []
    winner.config = settings(embedding_decay=None)
    while not winner.finished:
        winner.step()

    def make(config):
        each = config.embedding_decay
        each = None if each is None else round(each, 9)
        made.append((each, config.embedding_dropout, config.distillation))
        return Scripted([0.5, scores[made[-1]]])

    best, rows = race_taught(winner, trials(make), decay)
    assert made == list(scores)
    assert [row["chosen"] for row in rows] == [at == chosen for at in range(len(rows))]
    each, dropout, share = made[chosen]
    name = f"{share:.0%} of the labels a teacher's{f', weight decay {each:g}' if each else ''}"
    assert rows[chosen]["name"] == name + (", dropout 0.1" if dropout else "")
    assert best.scores[1] == max(scores.values())


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ({"embedding_dropout": 0.2}, [(1e-5, 0.2), (1e-6, 0.2), (1e-5, 0.2), (None, 0.2)]),
        ({"embedding_decay": 1e-3}, [(1e-3, P), (1e-3, P), (1e-3, 0)]),
        ({"embedding_decay": 1e-3, "embedding_dropout": 0.0}, [(1e-3, 0), (1e-3, 0)]),
    ],
)
def test_what_a_user_gives_is_taken(given, ways):
    winner, made = ended([0.5, 0.5]), []
    winner.config = settings(**{"embedding_decay": None, **given})

    def make(config):
        each = config.embedding_decay
        made.append((each and round(each, 9), config.embedding_dropout))
        return Scripted([0.5, 0.6])

    race_taught(winner, trials(make), 1e-5)
    assert made == ways


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        # Scores by decay and dropout, in the order in which they are asked for.
        (
            {(1e-4, 0): 3, (1e-5, 0): 2, (1e-3, 0): 2, (1e-4, DROPOUT): 4},
            (1e-4, DROPOUT),
        ),
        # More is better than less.
        (
            {(1e-4, 0): 3, (1e-5, 0): 1, (1e-3, 0): 5, (1e-2, 0): 6, (1e-2, DROPOUT): 1},
            (1e-2, 0),
        ),
        # It is not: none may be better still.
        ({(1e-4, 0): 1, (1e-5, 0): 2, (0, 0): 1, (1e-5, DROPOUT): 1}, (1e-5, 0)),
        ({(1e-4, 0): 1, (1e-5, 0): 1, (0, 0): 3, (0, DROPOUT): 4}, (0, DROPOUT)),
    ],
)
def test_a_full_table_gets_the_decay_and_the_dropout_that_serve_it(scores, best):
    made = []

    def train(config):
        made.append((config.embedding_decay or 0, config.embedding_dropout or 0))
        return scores[made[-1]]

    found = contenders.regularised(settings(method="fixed", embedding_decay=None), train)
    assert made == list(scores)
    assert (found.embedding_decay or 0, found.embedding_dropout or 0) == best
    made.clear()
    scores = {(1e-4, 0.3): 1}
    given = settings(method="fixed", embedding_decay=1e-4, embedding_dropout=0.3)
    assert contenders.regularised(given, train) == given and len(made) == 1


def test_a_table_that_has_been_trained_plainly_takes_part():
    scores = {(0, 0): 4, (1e-4, 0): 2, (1e-5, 0): 3, (0, DROPOUT): 1}
    made = []

    def train(config):
        made.append((config.embedding_decay or 0, config.embedding_dropout or 0))
        return scores[made[-1]]

    config = settings(method="fixed", embedding_decay=None)
    assert contenders.regularised(config, train, True) == config
    assert made == list(scores)


@pytest.mark.parametrize(
    ("scores", "made", "winner"),
    [
        # By share of the bytes and of the labels: fewer bytes win, so a teacher's pupils try them.
        ({(1, 0): 0.5, (0.3, 0): 0.6, (1, 0.5): 0.7, (0.3, 0.5): 0.8}, 4, (0.3, 0.5)),
        ({(1, 0): 0.5, (0.3, 0): 0.6, (1, 0.5): 0.7, (0.3, 0.5): 0.6}, 4, (1, 0.5)),
        # They do not, and are not tried again.
        ({(1, 0): 0.5, (0.3, 0): 0.4, (1, 0.5): 0.7}, 3, (1, 0.5)),
        # The teacher is of no use.
        ({(1, 0): 0.5, (0.3, 0): 0.6, (1, 0.5): 0.4}, 3, (0.3, 0)),
    ],
)
def test_with_a_teacher_all_of_the_bytes_come_first(monkeypatch, scores, made, winner):
    tried = {}

    def make(config, taught=None):
        assert (taught is not None) == bool(config.distillation)
        key = (round(config.budget / 0.25, 2), config.distillation or 0)
        tried[key] = Scripted([0.5, scores[key]])
        tried[key].config, tried[key].table = config, None
        return tried[key]

    class Teacher:
        def labels(self):
            return torch.ones(3)

        def add(self, learner):
            assert learner in tried.values()

    def one_size(sized, winner, used, trials, weaker):
        learner = trials.make(dataclasses.replace(sized, budget=used * LESS))
        return contenders.contend("less", learner, winner, trials)

    def taught(winner, trials, decay, config, sure):
        learner = trials.make(dataclasses.replace(config, distillation=0.5))
        best, row = contenders.contend("taught", learner, winner, trials)
        return best, [row]

    monkeypatch.setattr(contest.methods, "dense_bytes", lambda table: 4)
    monkeypatch.setattr(contest, "race_bytes", one_size)
    monkeypatch.setattr(contest, "race_taught", taught)
    monkeypatch.setattr(Contest, "_teacher", lambda self: Teacher())
    options = {"capacity_bits": 4.0}
    first = make(settings(table_options=options))
    while not first.finished:
        first.step()
    course = Contest(first, trials(make))
    course.run({"sized": options, "given": {}, "budget": 0.25})
    assert course.winner is tried[winner] and len(tried) == made


@pytest.mark.parametrize(
    ("left", "given", "score", "tried", "decay"),
    [
        (200.0, None, 0.6, [DECAY], DECAY),
        (200.0, None, 0.4, [DECAY], None),
        (math.inf, None, 0.6, [], None),
        (200.0, 0.0, 0.6, [], 0.0),
    ],
)
def test_where_time_is_limited_weight_decay_comes_first(
    monkeypatch, left, given, score, tried, decay
):
    made = []

    def make(config):
        made.append(Scripted([0.3, score]))
        made[-1].config = config
        return made[-1]

    def no_fewer(self, name, raced, options, labels=None):
        assert self.winner.config.embedding_decay == decay
        return options

    first = ended([0.5, 0.5])
    first.config = settings(embedding_decay=given, distillation=0.5)
    monkeypatch.setattr(Contest, "_fewer_bytes", no_fewer)
    monkeypatch.setattr(Contest, "_teach", lambda self, fewer: pytest.fail() if fewer else None)
    course = Contest(first, trials(make, left=lambda: left))
    course.run({"sized": {}, "given": {}, "budget": 0.25})
    assert [learner.config.embedding_decay for learner in made] == tried
    assert course.winner.config.embedding_decay == decay
    assert [learner.released for learner in made] == [score < 0.5] * len(tried)
    assert (course.found["decayed"] or {}).get("score") == (score if tried else None)


@pytest.mark.parametrize("score", [0.4, 0.6])
@pytest.mark.parametrize(
    ("left", "asked", "may", "tried"),
    [
        (math.inf, None, True, ["last"]),
        (60.0, None, True, ["first"]),
        (math.inf, None, False, []),
        (math.inf, False, True, []),
        (math.inf, True, True, []),
        (0.0, None, True, []),
    ],
)
def test_hidden_values_are_tried_once_they_may_be(monkeypatch, left, asked, may, tried, score):
    made, when, labels = [], [], torch.rand(4)

    def make(config):
        assert config.hides
        # Far behind after two laps, which ends nothing.
        made.append(Scripted([0.1, 0.1, 0.1, score]))
        made[-1].config = config
        when.append("last" if fewer else "first")
        return made[-1]

    fewer = []
    first = ended([0.5, 0.5])
    first.config, first.may_hide = settings(hides=asked, distillation=0.5), may
    monkeypatch.setattr(Contest, "_fewer_bytes", lambda *a, **k: fewer.append(1) or {})
    monkeypatch.setattr(Contest, "_teach", lambda self, fewer: labels)
    monkeypatch.setattr(Contest, "_law", lambda self, raced, options, labels: options)
    monkeypatch.setattr(Trials, "taught", lambda self, given: self if given is labels else None)
    first.config = dataclasses.replace(first.config, distillation=None if left == 60.0 else 0.5)
    course = Contest(first, trials(make, left=lambda: left))
    course.run({"sized": {}, "given": {}, "budget": 0.25})
    better = score > 0.5
    assert when == tried
    assert course.winner is (made[0] if better and tried else first)
    assert [learner.released for learner in made] == [not better] * len(made)
    assert (course.found["hidden"] or {}).get("chosen") == (better if tried else None)


@pytest.mark.parametrize("best", [None, 1e-5, DECAY, 1e-3])
def test_what_is_expected_is_asked_for_or_forgotten(best):
    config = settings(method="fixed", embedding_decay=None, embedding_dropout=None)
    # As a run does at its start.
    expected, forgotten, trained = contenders.likely_regularised(config), [], []
    hints = SimpleNamespace(
        expect=lambda *entries: expected.extend(entries),
        forget=lambda *entries: forgotten.extend(entries),
    )

    def train(entry):
        trained.append(entry)
        away = math.log10(entry.embedding_decay or 1e-6) - math.log10(best or 1e-6)
        return bool(entry.embedding_dropout) / 2 - abs(away)

    found = contenders.regularised(config, train, trials=hints)
    assert found.embedding_decay == best and found.embedding_dropout == DROPOUT
    assert all(entry in [*trained, *forgotten] for entry in expected)
    # Nothing that was to be asked for was forgotten before.
    assert trained[:2] == expected[:2] and found in expected


def ended(scores):
    learner = Scripted(scores)
    while not learner.finished:
        learner.step()
    return learner


class Clock:
    """Late once so many steps were taken, by all learners together."""

    def __init__(self, steps):
        self.left = steps

    def step(self, learner):
        self.left -= 1
        learner.step()

    def trials(self, make):
        return Trials(make, Silent(), self.step, lambda: self.left)


def test_what_is_better_when_the_time_is_up_counts_as_it_stands():
    winner, clock, made = ended([0.5, 0.8]), Clock(9), []

    def make(config):
        made.append(Scripted([0.7, 0.85, 0.9, 0.95]))
        return made[-1]

    best, row = race_bytes(settings(), winner, 0.25, clock.trials(make))
    assert best is made[0] and len(made) == 1 and row["score"] == 0.85 and row["chosen"]
    assert best.steps == 9


def test_what_is_begun_is_validated_once_though_the_time_is_up():
    winner, clock = ended([0.5, 0.8]), Clock(1)
    late = Scripted([0.7, 0.9])
    better, row = contenders.contend("late", late, winner, clock.trials(pytest.fail))
    assert better is None and row["score"] == 0.7 and late.steps == 4


def test_nothing_is_begun_when_the_time_is_up():
    winner, late = ended([0.5, 0.8]), Clock(0).trials(pytest.fail)
    assert race_bytes(settings(), winner, 0.25, late) == (None, None)
    assert race_law(settings(), winner, late) == (None, None)
    course = Contest(winner, late)
    winner.table = None
    course.run({"sized": {}, "given": {}, "budget": 0.25})
    assert course.winner is winner
    assert not any(course.found.values())


def test_without_time_for_a_teacher_the_better_share_is_not_looked_for():
    winner, clock, made = ended([0.5, 0.8]), Clock(8), []
    winner.config = settings(embedding_decay=None)

    def make(config):
        made.append(config)
        return Scripted([0.5, 0.9])

    best, rows = race_taught(winner, clock.trials(make), 1e-5)
    assert len(made) == len(rows) == 1 and best_score(best) == 0.9


def test_a_race_without_time_is_decided_by_the_first_validations():
    made = {}

    def make(entry):
        bits = entry.table_options.get("capacity_bits")
        name = FULL if entry.method == "fixed" else FLAT if bits > 100 else bits
        made[name] = Scripted([{FULL: 0.9, FLAT: 0.1, 16.0: 0.4, 4.0: 0.5, 1.0: 0.2}[name], 0.3])
        return made[name]

    result = race(settings(method="rule"), Clock(0).trials(make))
    assert result.learner is made[4.0]
    assert {learner.steps for learner in made.values()} == {4}


@pytest.mark.parametrize(
    ("left", "told"),
    [
        (math.inf, "others are tried for 16 to 50 minutes more (--time-limit ends that"),
        (90.0, "others are tried for 1.5 minutes, until --time-limit; all take 16 to 50"),
    ],
)
def test_how_long_the_rest_may_take(left, told):
    first = SimpleNamespace(history=[{"seconds": 60.0}, {"seconds": 60.0}])
    notes = []
    observer = SimpleNamespace(note=notes.append)
    trials = Trials(None, observer, None, left=lambda: left)
    Contest(first, trials)._announce()
    assert len(notes) == 1 and told in notes[0]
    first.history = [{"seconds": 5.0}]
    Contest(first, trials)._announce()
    assert len(notes) == 1
