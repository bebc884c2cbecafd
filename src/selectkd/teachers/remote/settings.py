"""What a connection's settings are called where the user wrote them, for errors that say what to change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The names of a connection's settings: a recipe's keys, or flags. None: there is no such setting."""

    url: str
    model: str
    key: str
    wait: str | None = None
    k: str | None = None
    ca: str | None = None

    @classmethod
    def under(cls, section: str) -> Settings:
        """The keys of a recipe's section."""
        names = ("url", "model", "api_key_env", "wait", "k", "ca")
        return cls(*(f"{section}.{name}" for name in names))


TEACHER = Settings.under("teacher")
POLICY = Settings.under("data.policy.served")
JUDGE = Settings("--judge", "--judge-model", "--api-key-env")
SPECULATE = Settings("--server", "--server-model", "--api-key-env")
DOCTOR = Settings("the URL", "--model", "--api-key-env", k="--k", ca="--ca")
