"""Pairs of words as a field beside them, and texts that say the more the longer they are."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.columns import called, column_of
from amtl.data.encoding import Encoder
from amtl.data.lists import FEWEST_TIMES, WORDS
from amtl.data.pairs import take
from amtl.data.registry import Source
from amtl.data.specs import FieldSpec
from amtl.run.config import TrainConfig
from amtl.run.folders import load_run, load_trained, pack_run
from amtl.run.learner import Learner
from amtl.run.model import assemble
from amtl.run.preparation import prepare
from amtl.run.training import start

ROWS = 3000
SAID = ["good", "bad", "fine", "dull", "odd"]


def reviews(by_pairs: bool) -> pl.DataFrame:
    """Labels follow which words there are, or whether `not` stands before one."""
    rng = np.random.default_rng(2)
    said, no = rng.integers(0, len(SAID), ROWS), rng.random(ROWS) < 0.5
    other = rng.integers(0, len(SAID), ROWS)
    texts = [
        f"{'not ' if n else ''}{SAID[a]} {'' if n else 'and not '}{SAID[b]}, no. {i}"
        for i, (a, b, n) in enumerate(zip(said, other, no, strict=True))
    ]
    liked = 2 - 0.5 * (said + other)
    if by_pairs:
        liked = np.where(no, -1, 1) * np.where(said < 2, 1, -1)
    chance = 1 / (1 + np.exp(-2.0 * liked))
    return pl.DataFrame({"text": texts, "liked": (rng.random(ROWS) < chance).astype(int)})


def task_of(frame: pl.DataFrame, **given: object):
    config = TrainConfig("made", "liked", **given)
    return config, prepare(config, Source("made", frame, "liked"))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("It's SO Soft -- isn’t it?", ["it's so", "so soft", "soft isn’t", "isn’t it"]),
        ("Soft", []),
        ("", []),
        (None, None),
    ],
)
def test_pairs_of_a_text(text, pairs):
    spec = FieldSpec("x.pairs", "bag", part="pairs", of="x")
    column = pl.Series("x", [text, "a b"], dtype=pl.String)
    assert take(column, spec).to_list() == [pairs, ["a b"]]
    assert take(pl.Series("x", [1, 2]), spec).to_list() == [None, None]


def test_pairs_are_a_field_where_labels_follow_them_beside_words():
    _, task = task_of(reviews(by_pairs=True))
    words, pairs = task.encoder.fields
    assert (words.separator, pairs.name, pairs.column) == (WORDS, "text.pairs", "text")
    assert "--drop text.pairs leaves them out" in pairs.note
    vocabulary = task.encoder.vocabularies[1]
    assert {"not good", "good and"} <= set(vocabulary.values)
    counts = vocabulary.counts.tolist()
    del counts[vocabulary.oov_row]
    assert min(counts) >= FEWEST_TIMES
    _, task = task_of(reviews(by_pairs=True), drop=["text.pairs"])
    assert task.encoder.names == ["text"]
    _, task = task_of(reviews(by_pairs=False))
    assert task.encoder.names == ["text"]


def test_pairs_can_be_asked_for():
    frame = reviews(by_pairs=False)
    spec = called(frame, "text.pairs")
    assert spec == FieldSpec("text.pairs", "bag", part="pairs", of="text")
    assert column_of(frame, spec).name == "text.pairs"
    _, task = task_of(frame, fields=["text", "text.pairs"], separators={"text": WORDS})
    assert task.encoder.names == ["text", "text.pairs"]
    assert called(frame, "liked.pairs") is None


def test_averages_of_words_grow_with_the_root_of_their_number():
    config, task = task_of(reviews(by_pairs=True))
    assert [field.root for field in task.encoder.fields] == [True, True]
    model = Learner(config, task).model.eval()
    batch = task.val.batch(torch.arange(40))
    found = model.embed(batch)
    mean = model.table(batch.indices, batch.offsets).view(40, 2, -1)
    ends = torch.tensor([len(batch.indices)])
    lengths = torch.diff(batch.offsets, append=ends).view(40, 2)
    assert len(lengths.unique()) > 2
    torch.testing.assert_close(found, mean * lengths.sqrt()[:, :, None])
    assert model.state_dict().keys() == {k for k in model.state_dict() if "roots" not in k}


def test_packed_models_say_what_trained_ones_do(tmp_path):
    source = Source("made", reviews(by_pairs=True), "liked")
    config = TrainConfig("made", "liked", epochs=2, batch_size=100, race=False)
    start(config, tmp_path / "run", source=source).run()
    packed = pack_run(tmp_path / "run", tmp_path / "model.safetensors")
    opened = load_trained(tmp_path / "model.safetensors")
    wanted = load_run(tmp_path / "run").probabilities(source.frame)
    assert wanted.std() > 0.01
    for trained in (packed, opened):
        assert torch.equal(trained.probabilities(source.frame), wanted)


def test_runs_of_earlier_versions_have_plain_averages():
    config, task = task_of(reviews(by_pairs=False))
    tensors, meta = task.encoder.to_tensors()
    assert meta["fields"][0].pop("root") is True
    old = Encoder.from_tensors(tensors, meta)
    assert not old.fields[0].root
    model = assemble(config, old, Learner(config, task).table).eval()
    batch = task.val.batch(torch.arange(9))
    mean = model.table(batch.indices, batch.offsets).view(9, 1, -1)
    assert torch.equal(model.embed(batch), mean)
