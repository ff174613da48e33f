"""What a person is told of a command that fails: one line, or a log; and what Ctrl-C does."""

from __future__ import annotations

import io
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.text import Text

from amtl.errors import INTO_ONE, UserError

LOG = "amtl-error.log"
MISTAKE, USAGE, STOPPED = 1, 2, 130
_STOPPED = "stopped by Ctrl-C"


class Stopper:
    """First Ctrl-C: finish the step and save a checkpoint. Second: stop at once.

    Args:
        console: where that is said.
    """

    def __init__(self, console: Console) -> None:
        self.asked = False
        self._console = console

    def __enter__(self) -> Stopper:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._console.print(
            "\n  stopping after this step (Ctrl-C again to stop at once)", style="yellow"
        )

    def __call__(self, steps: int) -> bool:
        """Whether training is to stop, after so many steps."""
        return self.asked


def run(app: typer.Typer, args: Sequence[str]) -> int:
    """Runs a command line and returns its exit status; nothing escapes but the end of Python.

    A mistake that the user can mend is told in one line on stderr (1; 2 where the command line
    itself is at fault), Ctrl-C ends with 130. Anything else is told in one line too (1), with the
    file that has its traceback: `amtl-error.log` in the working directory, or where that cannot be
    written in the folder for temporary files. Characters that the terminal cannot show are
    replaced.

    Args:
        app: the commands.
        args: the words after the program's name; without any, the help is shown.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    try:
        code = command.main(list(args) or ["--help"], prog_name="amtl", standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else MISTAKE
    except KeyboardInterrupt:
        code = STOPPED
    except UserError as error:
        return tell(str(error))
    except OSError as error:
        name = repr(str(error.filename)) if error.filename else "a file or the output"
        return tell(f"cannot use {name}: {error.strerror or error}")
    except BaseException as error:  # polars panics with no Exception
        if isinstance(error, typer.Abort):
            # Of Ctrl-C, or of a file that ends too soon.
            if not isinstance(error.__cause__, EOFError):
                return tell(_STOPPED, STOPPED)
            error = error.__cause__
        if hasattr(error, "format_message"):
            message = f"{error.format_message()} (amtl COMMAND --help has the options)"
            if "unexpected extra" in message and any(Path(word).is_file() for word in args):
                message += f"; of a command that takes one file of rows, {INTO_ONE}"
            return tell(message, USAGE)
        reason = str(error).strip() or "no further word"
        log = write_log(args)
        return tell(
            f"{type(error).__name__}: {reason:.300} (not expected here: the traceback is in {log})"
        )
    if code == STOPPED:
        return tell(_STOPPED, STOPPED)
    return code if isinstance(code, int) else 0


def tell(message: str, code: int = MISTAKE) -> int:
    """Prints one line on stderr and returns `code`."""
    line = "".join(c if c.isprintable() else " " for c in message)
    text = Text.assemble(("error:", "bold red"), " ", line)
    Console(stderr=True, emoji=False).print(text, highlight=False, soft_wrap=True)
    return code


def write_log(args: Sequence[str]) -> Path:
    """Writes the traceback of the exception at hand to the log and returns where that is."""
    content = f"amtl {' '.join(args)}\n\n{traceback.format_exc()}"
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            (folder / LOG).write_text(content, errors="backslashreplace")
        except OSError:
            continue
        return folder / LOG
    return Path("(nowhere: no folder can be written)")
