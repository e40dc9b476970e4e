"""Which sites and devices the constraints let a model run on at all, and names in them that nobody has."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from topology.checks import nearest
from topology.constraints import Constraints
from topology.errors import ConstraintError
from topology.snapshot import Device, Snapshot

_WILD = frozenset("*?[")


def check_names(snapshot: Snapshot, constraints: Constraints, origin: str | None = None) -> None:
    """Raises ConstraintError where a constraint names a site, region or vendor that the snapshot does not hold.

    A pattern that matches no region is refused where it should choose some; where it only excludes, it may wait for
    regions to come.
    """
    sites = [site.name for site in snapshot.sites]
    regions = {site.region for site in snapshot.sites if site.region}
    vendors = {device.vendor for site in snapshot.sites for device in site.devices}
    for key, names, known in (
        ("sites", constraints.sites, sites),
        ("exclude_sites", constraints.exclude_sites, sites),
    ):
        for name in names:
            if name not in known:
                raise ConstraintError(f"{key} names {name!r}, which is unknown: {nearest(name, known, 'known')}")
    for key, names in (("regions", constraints.regions), ("exclude_regions", constraints.exclude_regions)):
        for name in names:
            wild = bool(_WILD & set(name))
            if not _matches_any(regions, name) and (key == "regions" or not wild):
                hint = nearest(name, regions, "known")
                raise ConstraintError(f"{key} names {name!r}, which {'matches none' if wild else 'is unknown'}: {hint}")
    for name in constraints.vendors:
        if name.casefold() not in {vendor.casefold() for vendor in vendors}:
            raise ConstraintError(f"vendors names {name!r}, which is unknown: {nearest(name, vendors, 'known')}")
    if constraints.private and origin is None:
        raise ConstraintError("private needs the submitting site: give origin, the name of a site")
    if constraints.private and origin not in sites:
        raise ConstraintError(f"origin is {origin!r}, which is unknown: {nearest(str(origin), sites, 'known')}")


def allowed_sites(snapshot: Snapshot, constraints: Constraints) -> frozenset[str]:
    """Names of the sites on which the constraints let a model run."""
    return frozenset(
        site.name
        for site in snapshot.sites
        if (not constraints.sites or site.name in constraints.sites)
        and (not constraints.regions or matches(site.region, constraints.regions))
        and not matches(site.region, constraints.exclude_regions)
        and (site.trusted or not constraints.trusted_only)
        and site.name not in constraints.exclude_sites
    )


def allowed_device(device: Device, constraints: Constraints) -> bool:
    """Whether the constraints let a model run on the device, its site aside."""
    vendors = {vendor.casefold() for vendor in constraints.vendors}
    return not vendors or device.vendor.casefold() in vendors


def matches(region: str, patterns: Iterable[str]) -> bool:
    """Whether a region fits any of the names or patterns."""
    return any(fnmatch.fnmatchcase(region, pattern) for pattern in patterns)


def _matches_any(regions: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(region, pattern) for region in regions)
