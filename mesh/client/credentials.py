"""How a client proves itself to a peer, and how it knows that it talks to the right one.

A peer with an identity serves TLS under a certificate of its cluster's authority. A client needs the authority's
certificate to check that, and something to show for itself: a user has both in one line of text, the token; a peer
signs an assertion for the peer it calls. Without credentials a connection is plain, which only peers without an identity
answer, on loopback.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import platformdirs

from mesh.errors import ConfigError
from mesh.identity import EVERY_SITE, access_from_text

#: Where a peer leaves a token for the users of its own machine account, in its data directory.
TOKEN_FILE = "identity/local.token"
MAX_TOKEN_BYTES = 16 << 10


@dataclass(frozen=True)
class Credentials:
    """`authority` is its certificate (PEM); `server` a name that the peer's certificate must hold.

    `proof()` gives the value of a call's `authorization`; it is called for every call, from gRPC's threads.
    """

    authority: bytes
    proof: Callable[[], str]
    server: str = EVERY_SITE

    def channel(self, address: str, options: list[tuple[str, Any]]) -> grpc.Channel:
        """A TLS channel that carries the proof with each call."""
        tls = grpc.ssl_channel_credentials(root_certificates=self.authority)
        calls = grpc.metadata_call_credentials(_Proof(self.proof))
        return grpc.secure_channel(
            address,
            grpc.composite_channel_credentials(tls, calls),
            options=[*options, ("grpc.ssl_target_name_override", self.server)],
        )


class _Proof(grpc.AuthMetadataPlugin):  # type: ignore[misc, unused-ignore]
    def __init__(self, proof: Callable[[], str]) -> None:
        self._proof = proof

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        try:
            callback((("authorization", self._proof()),), None)
        except Exception as error:
            callback((), error)


def for_user(token: str | None, address: str) -> Credentials | None:
    """The credentials of a user: an argument, else `$MESH_TOKEN`, else what a peer of this machine left for us.

    Each of the first two is a token or the path of a file that holds one. None where there is none: a plain
    connection. Raises ConfigError for a token that is none.
    """
    for key, text in (("token", token), ("MESH_TOKEN", os.environ.get("MESH_TOKEN"))):
        if text:
            return _parsed(key, text)
    path = _left_for_us(address)
    return _parsed(str(path), str(path)) if path is not None else None


def _parsed(key: str, text: str) -> Credentials:
    text = text.strip()
    if len(text) < 4096 and (os.sep in text or text.endswith(".token")):
        try:
            text = Path(text).expanduser().read_text("ascii")[:MAX_TOKEN_BYTES].strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: the token file cannot be read ({error}); name one that can") from None
    access = access_from_text(text)  # raises ConfigError
    return Credentials(access.authority_pem, lambda: access.token)


def _left_for_us(address: str) -> Path | None:
    """The token of the peer of this account that listens at `address`: its first line names the address."""
    root = platformdirs.user_data_path("isthmus", appauthor=False)
    for path in sorted(root.glob(f"*/{TOKEN_FILE}")):
        try:
            if path.with_suffix(".address").read_text("utf-8").strip() == address:
                return path
        except OSError:
            continue
    return None
