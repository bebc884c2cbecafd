"""Credentials have no place in a recipe, which the run's files show."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from selectkd.config.section import refuse

SECRET = re.compile(
    r"secret|passw|token|key|credential|signature|(?<![a-z])(auth|sig|sas)(?![a-z])", re.IGNORECASE
)
"""Part of the names of options and URL parameters that hold credentials."""


def no_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Refuses credentials, which would be written into the run's files."""
    for name, value in options.items():
        if SECRET.search(name):
            raise refuse(
                f"{name} may be a credential, which the run's files would show; set it in the environment, "
                "such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://"
            )
        if isinstance(value, dict):
            no_secrets(value)
    return options


def no_secrets_in_url(path: str) -> str:
    """Refuses a URL with a password or a signature in it."""
    if "://" in path:
        parts = urlsplit(path)
        if "@" in parts.netloc:
            raise refuse("the URL names a user, whom the run's files would show; set it in the environment")
        no_secrets(dict(parse_qsl(parts.query, keep_blank_values=True)))
    return path
