"""Text as its words."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.data.lists import FEWEST_TIMES, WORDS, split
from amtl.data.readers import as_frame
from amtl.errors import UserError

ROWS = 1500
NOUNS = ["dress", "shirt", "coat", "skirt", "scarf", "boots"]
LIKED = {"lovely": 1.5, "soft": 0.7, "grey": 0.0, "itchy": -0.7, "torn": -1.5}


def reviews(told: float = 1.0, rows: int = ROWS) -> tuple[pl.DataFrame, np.ndarray]:
    """Texts that are all different, and labels that follow one of their words, or do not."""
    rng = np.random.default_rng(3)
    said, noun = rng.choice(list(LIKED), rows), rng.choice(NOUNS, rows)
    texts = [f"A {a} {b}, no. {i}!" for i, (a, b) in enumerate(zip(said, noun, strict=True))]
    chance = 1 / (1 + np.exp(-told * np.array([LIKED[word] for word in said])))
    return pl.DataFrame({"text": texts}), (rng.random(rows) < chance).astype(float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's SO Soft -- isn’t it?", ["it's", "so", "soft", "isn’t", "it"]),
        ("Größe 42,5\n'ok'", ["größe", "42", "5", "ok"]),
        ("...", []),
        ("", []),
        (None, None),
    ],
)
def test_words_of_a_text(text, words):
    assert split(pl.Series([text], dtype=pl.String), WORDS).to_list() == [words]


@pytest.mark.parametrize("rows", [ROWS, 400])
def test_text_that_hardly_comes_again_is_its_words_where_these_tell_of_labels(rows):
    frame, labels = reviews(rows=rows)
    (field,) = infer_fields(frame, ["text"], labels=labels)
    assert (field.kind, field.separator) == ("bag", WORDS)
    assert "whose words tell of labels" in field.note and "--numeric text=categ" in field.note
    for given in ({"numeric": {"text": "categorical"}}, {"separators": {"text": ""}}):
        (field,) = infer_fields(frame, ["text"], labels=labels, **given)
        assert field.kind == "categorical"


@pytest.mark.parametrize("join", ["/", ".", "-", "+", ":", " > "])
def test_so_are_paths_and_names_of_packages(join):
    frame, labels = reviews()
    texts = frame["text"].str.replace_all("[,.!]", "").str.replace_all(" ", join)
    (field,) = infer_fields(texts.to_frame(), ["text"], labels=labels)
    assert (field.kind, field.separator) == ("bag", WORDS)
    # Of web addresses hosts are fields, and say more than the words do.
    text = texts.str.replace_all(join, "-", literal=True)
    sites = [f"https://q{i % 90}.example.org/" for i in range(ROWS)]
    (field,) = infer_fields(
        (pl.Series(sites) + text).alias("text").to_frame(), ["text"], labels=labels
    )
    assert field.kind == "unused"


def test_other_text_is_not():
    frame, labels = reviews(told=0.0)
    (field,) = infer_fields(frame, ["text"], labels=labels)
    assert field.kind == "unused" and "--multi text=words" in field.note
    frame, labels = reviews()
    assert infer_fields(frame, ["text"])[0].kind == "unused"
    for values in (
        frame["text"].str.replace_all(r"\PL", ""),  # No spaces: each is a word.
        pl.Series(
            [f"{a:.3f}, {b:.3f}" for a, b in np.random.default_rng(0).normal(size=(ROWS, 2))]
        ),
        frame["text"].str.head(12),  # Each comes again.
    ):
        column = values.alias("text").to_frame()
        assert infer_fields(column, ["text"], labels=labels)[0].separator != WORDS
    some, few = frame[:190], labels[:190]
    assert infer_fields(some, ["text"], labels=few)[0].separator != WORDS


@pytest.mark.parametrize("separator", [",", "; "])
def test_text_is_taken_apart_unless_labels_follow_the_whole_rather(separator):
    rng, rows = np.random.default_rng(5), 3 * ROWS
    liked = rng.normal(size=12)
    has = [np.sort(rng.choice(12, rng.integers(1, 5), replace=False)) for _ in range(rows)]
    genres = pl.Series("genres", [separator.join(f"Genre {n}" for n in each) for each in has])
    chance = 1 / (1 + np.exp([-2 * liked[each].mean() for each in has]))
    labels = (rng.random(rows) < chance).astype(float)
    gaps = pl.when(pl.int_range(pl.len()) % 9 > 0).then("genres").alias("genres")
    for frame in (genres.to_frame(), genres.to_frame().select(gaps)):
        (field,) = infer_fields(frame, ["genres"], labels=labels)
        assert (field.kind, field.separator) == ("bag", separator.strip())
        assert "hold several values; --multi genres= keeps them whole" in field.note
        for some in ({"separators": {"genres": ""}}, {"numeric": {"genres": "categorical"}}):
            (field,) = infer_fields(frame, ["genres"], labels=labels, **some)
            assert field.kind == "categorical"
    # Each combination is liked or not by itself, or few rows are all that is known.
    alone = {text: rng.random() for text in genres.unique().sort()}
    labels = (rng.random(rows) < genres.replace_strict(alone).to_numpy()).astype(float)
    for frame, told in ((genres.to_frame(), labels), (genres[:900].to_frame(), labels[:900])):
        (field,) = infer_fields(frame, ["genres"], labels=told)
        assert field.kind == "categorical" and "takes them apart" in field.note


def test_points_and_numbers_are_not_taken_apart():
    x, y = np.random.default_rng(0).integers(9, size=(2, 3 * ROWS))
    labels = np.random.default_rng(1).integers(2, size=3 * ROWS).astype(float)
    for texts in (
        [f"4{a}.5, 8{b}.25" for a, b in zip(x, y, strict=True)],
        [f"{a},{b}" for a, b in zip(x, y, strict=True)],
    ):
        (field,) = infer_fields(pl.DataFrame({"at": texts}), ["at"], labels=labels)
        assert field.kind != "bag"


def test_rare_words_share_a_row_and_spelling_does_not_matter():
    frame, labels = reviews()
    encoder = Encoder.fit(frame, infer_fields(frame, ["text"], labels=labels))
    (vocabulary,) = encoder.vocabularies
    counts = vocabulary.counts[: vocabulary.oov_row].tolist()
    assert set(vocabulary.values) == {*LIKED, *NOUNS, "a", "no"} and min(counts) >= FEWEST_TIMES
    again = Encoder.from_tensors(*encoder.to_tensors())
    one, other = (pl.DataFrame({"text": [text]}) for text in ("LOVELY coat", "lovely, Coat!"))
    rows = again.transform(one).rows
    assert rows.equal(again.transform(other).rows) and again.transform(one).unknown["text"] == 0


def test_rows_whose_lists_are_all_missing_have_empty_ones():
    lists = [["a", "b"], None, ["a"], []] * 50
    frame = pl.DataFrame({"list": lists, "text": ["a|b", None, "a", ""] * 50})
    fields = infer_fields(frame, ["list", "text"], separators={"text": "|"})
    encoder = Encoder.fit(frame, fields)
    nothing = encoder.transform(pl.DataFrame({"list": [None], "text": [None]}))
    assert [field.kind for field in encoder.fields] == ["bag", "bag"]
    assert all(bag.offsets.tolist() == [0, 0] for bag in nothing.bags)
    assert nothing.unknown == encoder.transform(frame[1:2]).unknown


WRITTEN = {
    "|": ["red|blue", "blue", "red|green|blue", None, "green", ""],
    ";": ["red;blue", "blue", "red; green;blue", None, "green", ""],
    ",": ["red, blue", "blue", "red,green , blue", None, "green", ""],
    "[]": ["['red', 'blue']", "['blue']", "['red', 'green', 'blue']", None, "['green']", "[]"],
}


@pytest.mark.parametrize("now", WRITTEN)
@pytest.mark.parametrize("then", WRITTEN)
def test_lists_may_be_written_in_another_way_than_training_had_them(then: str, now: str) -> None:
    frame = pl.DataFrame({"tags": WRITTEN[then] * 50})
    fields = infer_fields(frame, ["tags"], separators={"tags": then})
    encoder = Encoder.fit(frame, fields)
    (expected,), (found,) = (
        encoder.transform(pl.DataFrame({"tags": WRITTEN[how]})).bags for how in (then, now)
    )
    bags = [
        [bag.values[bag.offsets[code] : bag.offsets[code + 1]].tolist() for code in bag.codes]
        for bag in (expected, found)
    ]
    assert bags[0] == bags[1]


@pytest.mark.parametrize("sign", ["|", ";", ", ", ",", " "])
@pytest.mark.parametrize("values", [[31, 7, 5], ["red", "blue", "a-b"]])
def test_lists_may_come_as_text_that_is_joined_by_whatever_tells_them_apart(
    values: list[int] | list[str], sign: str
) -> None:
    lists = [values[:2], values, [], values[2:]] * 50
    frame = pl.DataFrame({"seen": lists})
    encoder = Encoder.fit(frame, infer_fields(frame, ["seen"]))
    joined = frame.select(pl.col("seen").cast(pl.List(pl.String)).list.join(sign))
    found, expected = encoder.transform(joined), encoder.transform(frame)
    assert found.unknown == {"seen": 0}
    rows = torch.arange(len(frame))
    assert torch.equal(found.batch(rows).indices, expected.batch(rows).indices)


@pytest.mark.parametrize("text", ["new, other", "red", "a, b", "", None])
def test_other_text_is_split_as_it_was(text: str | None) -> None:
    """Also where training had values with commas in them."""
    frame = pl.DataFrame({"tags": ["red|blue", "a, b|red", "blue", "green"] * 50})
    encoder = Encoder.fit(frame, infer_fields(frame, ["tags"], separators={"tags": "|"}))
    (bag,) = encoder.transform(pl.DataFrame({"tags": [text]})).bags
    assert len(bag.values) == bool(text)


def test_sets_are_refused_by_name() -> None:
    """Grouping them ends polars in a panic, which is no `Exception`."""
    frame = pl.DataFrame({"seen": [["a", "b"], ["a"], [], ["b"]] * 50})
    encoder = Encoder.fit(frame, infer_fields(frame, ["seen"]))
    with pytest.raises(UserError, match=r"'seen' holds objects of Python \(set\): make lists"):
        encoder.transform(as_frame({"seen": [{"a", "b"}, set()]}))
