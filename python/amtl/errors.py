"""The error a user can do something about."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what the user asked for; the message says what to do next.

    The command line prints the message without a traceback.
    """


def brief(value: object, most: int = 60) -> str:
    """A value as text for a message, cut short."""
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def together(names: Sequence[str]) -> str:
    """Tables by name, for one message however many they are: the first three, and how many more."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"table{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:3]))}{rest}"
