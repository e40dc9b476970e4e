"""How a client proves itself to a peer, and how it knows that it talks to the right one.

A peer with an identity serves TLS under a certificate of its cluster's authority. A client needs the authority's
certificate to check that, and something to show for itself: a user has both in one line of text, an access token; a
peer signs an assertion for the peer it calls. Without credentials a connection is plain: peers without an identity
answer it, on loopback.
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

#: Where a peer leaves an access token for users of its own account, in its data directory, and for which address.
LOCAL_TOKEN, LOCAL_ADDRESS = "identity/local.token", "identity/local.address"
#: The name in every site's certificate: `mesh.identity.certificate.COMMON_NAME`, without importing cryptography here.
EVERY_SITE = "peer.isthmus"
#: The key of a call's proof in its metadata.
AUTHORIZATION = "authorization"
_MAX_TOKEN_BYTES = 16 << 10


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
        both = grpc.composite_channel_credentials(tls, calls)
        return grpc.secure_channel(address, both, options=[*options, ("grpc.ssl_target_name_override", self.server)])


class _Proof(grpc.AuthMetadataPlugin):
    def __init__(self, proof: Callable[[], str]) -> None:
        self._proof = proof

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        try:
            metadata = ((AUTHORIZATION, self._proof()),)
        except Exception as error:  # gRPC wants it here: the call then fails with it
            callback((), error)
        else:
            callback(metadata, None)


def for_user(token: str | None, address: str) -> Credentials | None:
    """The credentials of a user: an argument, else `$MESH_TOKEN`, else what a peer of this account left for us.

    Each of the first two is an access token or the path of a file that holds one. None where there is none: a plain
    connection. Raises ConfigError for a file that cannot be read, IdentityError for what is no access token.
    """
    for key, text in (("token", token), ("MESH_TOKEN", os.environ.get("MESH_TOKEN"))):
        if text and text.strip():
            return _from_text(key, text.strip())
    path = _left_for_us(address)
    return None if path is None else _from_text("local token", str(path))


def _from_text(key: str, text: str) -> Credentials:
    from mesh.identity.access import PREFIX, Access

    if not text.startswith(PREFIX):
        try:
            with Path(text).expanduser().open("r", encoding="ascii") as file:
                text = file.read(_MAX_TOKEN_BYTES).strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: neither an access token nor a file with one ({error})") from None
    access = Access.parse(text)
    return Credentials(access.anchor.pem, lambda: access.proof)


def _left_for_us(address: str) -> Path | None:
    """The token file of the peer of this account that listens at `address`."""
    for folder in sorted(platformdirs.user_data_path("isthmus", appauthor=False).glob("*/identity")):
        try:
            if (folder.parent / LOCAL_ADDRESS).read_text("utf-8").strip() == address:
                return folder.parent / LOCAL_TOKEN
        except (OSError, ValueError):
            continue
    return None
