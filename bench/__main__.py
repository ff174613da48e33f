"""``python -m bench``: settles thread binding before torch loads its OpenMP, then runs the CLI."""

from __future__ import annotations

from bench import binding

binding.settle()

from bench.cli import app  # noqa: E402

if __name__ == "__main__":
    app(prog_name="python -m bench")
