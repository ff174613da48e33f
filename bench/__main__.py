"""``python -m bench``: settles thread binding before torch loads its OpenMP, then runs the CLI.

``python -m bench gpu`` is a command line of its own: a GPU may be lent without what the rest needs.
"""

from __future__ import annotations

import sys

from bench import binding

if __name__ == "__main__" and sys.argv[1:2] == ["gpu"]:
    from bench import gpu

    sys.exit(gpu.main(sys.argv[2:]))

binding.settle()

from bench.cli import app  # noqa: E402

if __name__ == "__main__":
    app(prog_name="python -m bench")
