"""The error a user can do something about."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user asked for; the message says what to do next.

    The command line prints the message without a traceback.
    """
