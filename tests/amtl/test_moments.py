"""Forms of dates and times: which ones are tried on a column of text."""

from datetime import datetime

import polars as pl
import pytest
from amtl.data import moments

MOMENTS = (datetime(2024, 1, 2, 3, 4, 5), datetime(1987, 12, 31, 23, 59, 58, 250_000))
TEXTS = {
    "words": [f"red house of {i} fast horses" for i in range(300)],
    "codes": [f"v{i}" for i in range(300)],
    "names": [f"python3-pandas-{i}" for i in range(300)],
    "units": [f"{i}.25 kg" for i in range(300)],
}


def written(form: str) -> list[str]:
    """Moments in a form, also with months cut short, and without spaces."""
    form = form.replace("%.f", ".25").replace("%#z", "+0200")
    texts = [when.strftime(f) for when in MOMENTS for f in (form, form.replace("%B", "%b"))]
    return [*texts, *(text.replace(" ", "") for text in texts), *(f" {text} " for text in texts)]


@pytest.mark.parametrize("form", moments._FORMS)
def test_what_a_form_reads_looks_like_it(form: str) -> None:
    texts = [text for other in moments._FORMS for text in written(other)]
    read = moments._read(pl.Series(texts), form).is_not_null()
    assert read.any()
    for text, is_read in zip(texts, read, strict=True):
        assert moments._looks_like([text], form, 0) or not is_read, text


@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_looks_like_no_moments_is_not_read_as_such(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading took a millisecond for each of a hundred forms, and several times a column."""
    tried: list[str] = []
    read = moments._read
    monkeypatch.setattr(
        moments, "_read", lambda cells, form: tried.append(form) or read(cells, form)
    )
    texts = pl.Series(TEXTS[kind])
    assert moments.find(texts) == []
    assert moments.odd_ones(texts) == []
    assert not tried
