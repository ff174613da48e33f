"""The error a user can do something about."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user asked for; the message says what to do next.

    The command line prints the message without a traceback.
    """


def brief(value: object, most: int = 60) -> str:
    """A value as text for a message, cut short."""
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
