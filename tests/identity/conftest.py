"""Small clusters in temporary folders; the clock is a number."""

from types import SimpleNamespace

import pytest

from mesh.identity.authority import Authority
from mesh.identity.invitation import Invitation
from mesh.identity.site import Joining

NOW = 1_800_000_000.0


@pytest.fixture
def cluster(tmp_path):
    """An authority with its first site "oslo", and `join(site)` for more."""
    first = Authority.create_cluster(tmp_path / "oslo", "acme", "oslo", NOW)
    authority = Authority.load(tmp_path / "oslo")

    def join(site, now=NOW):
        joining = Joining(tmp_path / site, Invitation.parse(authority.invite(now, ["127.0.0.1:7700"])), site)
        return joining.finish(authority.redeem(joining.request, now), now)

    return SimpleNamespace(authority=authority, oslo=first, join=join, folder=tmp_path, now=NOW)


@pytest.fixture
def stranger(tmp_path):
    """The first site of another cluster, of the same name, with a site of the same name."""
    return Authority.create_cluster(tmp_path / "stranger", "acme", "oslo", NOW)
