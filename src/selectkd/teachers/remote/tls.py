"""Whom a connection over TLS believes."""

from __future__ import annotations

import os
import ssl

import httpx2

from selectkd.errors import ConfigError


def trust(ca: str | None, setting: str | None) -> ssl.SSLContext:
    """The context of a connection: the authorities in the file ``ca`` alone, or else those of SSL_CERT_FILE where that
    is set, or else those of this machine. ConfigError, naming ``setting``, for a file that holds none.
    """
    file, named = (ca, setting) if ca is not None else (os.environ.get("SSL_CERT_FILE"), "SSL_CERT_FILE")
    try:
        return httpx2.create_ssl_context() if ca is None else ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else "holds no certificate in PEM"
        raise ConfigError(
            f"{named} = {str(file)[:200]} {reason}. Name the file with the certificate of the server's authority, or "
            "of the server itself where that is self-signed."
        ) from error


def certificate_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """The failed check of a certificate behind an error, if that is what it was."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
