"""The three ways a command can end other than well, each with its exit code."""

from __future__ import annotations


class Refused(ValueError):
    """A bad setting, bad data or an unusable machine, found before any work was done (exit code 2).

    The message says what was given, what was expected and what to do.
    """

    exit_code = 2


class RunFailed(RuntimeError):
    """Work had begun and cannot go on (exit code 1); what was saved before stays intact."""

    exit_code = 1


class Stopped(Exception):
    """A signal asked for a stop and everything needed to go on was saved (exit code 75)."""

    exit_code = 75
