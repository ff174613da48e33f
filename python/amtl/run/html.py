"""Pieces of self-contained HTML files: tables, sections, plots, the page around them."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from amtl.errors import UserError

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "amtl",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
"""Of plots, for `matplotlib.rc_context`."""

CSS = """
:root{color-scheme:light}
body{margin:0;background:#f1f5f9;color:#0f172a;font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Helvetica,Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
header p{color:#475569;max-width:80ch}
h1{font-size:30px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:0 0 14px}
section{background:#fff;border:1px solid #e2e8f0;border-radius:12px;padding:22px 24px;margin:18px 0}
figure{margin:0}figure svg{width:100%;height:auto;display:block}
.note{color:#64748b;font-size:13.5px;margin:12px 0 0;max-width:90ch}
.cards{display:flex;gap:14px;flex-wrap:wrap}
.card{flex:1;min-width:180px;background:#eff6ff;border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:28px;color:#1d4ed8;line-height:1.2}
.card span{font-size:13.5px;color:#475569}
.scroll{overflow-x:auto;margin-top:16px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{text-align:right;font-weight:600;color:#475569;border-bottom:2px solid #e2e8f0;padding:7px 10px;
white-space:nowrap}
td{text-align:right;padding:7px 10px;border-bottom:1px solid #f1f5f9;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
details td{white-space:normal;text-align:left}details th{text-align:left}
summary{cursor:pointer;color:#334155}
"""


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, in a box that scrolls."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def section(title: str, content: str, caption: str = "") -> str:
    """A headed box of HTML, with a caption of plain text."""
    note = f"<p class=note>{html.escape(caption)}</p>" if caption else ""
    return f"<section><h2>{html.escape(title)}</h2>{content}{note}</section>"


def svg(figure: Any, prefix: str) -> str:
    """A matplotlib figure as HTML; `prefix` keeps its names apart from those of other figures."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Text stays text, which a browser has letters for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    image = text[text.index("<svg") :]
    image = re.sub(r'(id="|url\(#|href="#)', lambda m: f"{m.group(1)}{prefix}-", image)
    return f"<figure>{image}</figure>"


def html_page(name: str, title: str, intro: str, body: str) -> str:
    """A whole file.

    Args:
        name: of the window, plain text.
        title: the heading, plain text.
        intro: HTML below it.
        body: HTML, sections.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title>
<style>{CSS}</style></head>
<body><main>
<header><h1>{html.escape(title)}</h1>
<p>{intro}</p></header>
{body}
</main></body></html>
"""


def require_matplotlib() -> Any:
    """The module.

    Raises:
        UserError: it is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('plots need matplotlib; run: pip install "amtl-kernels[demo]"') from error
    return matplotlib
