"""What can be wrong with a proof of who somebody is. All are `mesh.errors.IdentityError`, so one code crosses gRPC."""

from __future__ import annotations

from mesh.errors import IdentityError


class Damaged(IdentityError):
    """Bytes or text that nobody of this cluster made: not parseable, out of bounds, or with a wrong signature."""


class ForeignCluster(IdentityError):
    """Made by the authority of another cluster."""


class NotYetValid(IdentityError):
    """Valid only later: a clock is wrong, here or there."""


class Expired(IdentityError):
    """Valid only earlier."""


class KeyRevoked(IdentityError):
    """The key was put out of the cluster."""


class NameTaken(IdentityError):
    """The site name belongs to another key."""


class InvitationExpired(Expired):
    """The invitation's time is over."""


class InvitationUsed(IdentityError):
    """Another site has used the invitation."""


class InvitationUnknown(IdentityError):
    """The authority has no such invitation, or its secret is another."""


class TokenRevoked(IdentityError):
    """The API token was withdrawn."""
