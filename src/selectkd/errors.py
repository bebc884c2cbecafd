"""Every error a user can meet, each with the exit code the command line ends with.

An error says what is wrong (with the value), where (file:line or key), and what would work.
This module imports nothing, so that ``selectkd --help`` and configuration checks are instant.
"""

from __future__ import annotations


class SelectKDError(Exception):
    """Anything selectkd refuses or cannot finish; ``exit_code`` is a contract, see the subclasses."""

    exit_code = 1


class ConfigError(SelectKDError, ValueError):
    """A recipe, flag or argument that cannot work: exit code 2, raised before any weight loads."""

    exit_code = 2


class DataError(SelectKDError, ValueError):
    """A file or record that cannot be trained on: exit code 3."""

    exit_code = 3


class TeacherError(SelectKDError):
    """A teacher that cannot answer, or answers with something that must not be trained on: exit code 4."""

    exit_code = 4


class RemoteError(SelectKDError):
    """A service, such as the hub, that cannot be reached or refuses a request: exit code 4."""

    exit_code = 4


class IntegrityError(SelectKDError):
    """Stored bytes that are not what was written: exit code 5."""

    exit_code = 5


class CacheError(IntegrityError):
    """A teacher cache that is broken or belongs to another teacher, text or setting: exit code 5."""


class NumericsError(SelectKDError):
    """A run that no longer produces finite numbers: exit code 6."""

    exit_code = 6


class ResourceError(SelectKDError):
    """Too little disk or memory, with what is needed and what is free: exit code 7."""

    exit_code = 7


class Preempted(SelectKDError):
    """A run that a scheduler's SIGTERM ended after its step, its state saved: exit code 75."""

    exit_code = 75


class Interrupted(SelectKDError):
    """A run that a person's SIGINT ended after its step, its state saved: exit code 130."""

    exit_code = 130


def abridged(text: str, most: int = 60) -> str:
    """The beginning of a long text, for a message.

    >>> abridged("a" * 10, 6)
    'aaa...'
    """
    return text if len(text) <= most else text[: most - 3] + "..."
