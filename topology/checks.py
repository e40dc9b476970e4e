"""Checks of single constraint values: each takes a name and a value, and gives the value in its one proper form.

All raise ConstraintError that names the constraint, and for a wrong word the nearest one that would do.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

from topology.errors import ConstraintError

Check = Callable[[str, Any], Any]


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """Half a sentence for an error: the nearest known name, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"{what} are {', '.join(names)}" if names else f"none are {what}"


def word(allowed: Iterable[str], *, optional: bool = True) -> Check:
    """One of `allowed`; None where it is optional."""
    names = list(allowed)

    def check(name: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        if not isinstance(value, str) or value not in names:
            hint = nearest(str(value), names, "allowed")
            raise ConstraintError(f"{name} must be one of {', '.join(names)}, not {value!r}: {hint}")
        return value

    return check


def one_or_some(allowed: Iterable[str], any_of: str) -> Check:
    """One of `allowed` or the word `any_of`; or several of `allowed`, sorted; None. A list of one is that one."""
    names = list(allowed)
    one = word([*names, any_of])

    def check(name: str, value: Any) -> str | tuple[str, ...] | None:
        if not isinstance(value, (list, tuple, set, frozenset)):
            found: str | None = one(name, value)
            return found
        several = tuple(sorted({str(word(names)(name, entry)) for entry in value if entry is not None}))
        if not several:
            raise ConstraintError(f"{name} must be one of {', '.join(names)} or a list of them, not an empty list")
        return several if len(several) > 1 else several[0]

    return check


def words(allowed: Iterable[str]) -> Check:
    """Any of `allowed`, sorted; underscores stand for hyphens where only that makes the word known."""
    names = list(allowed)

    def check(name: str, value: Any) -> tuple[str, ...]:
        found = []
        for entry in texts(name, value):
            known = entry if entry in names else entry.replace("_", "-")
            if known not in names:
                hint = nearest(entry, names, "known")
                raise ConstraintError(f"{name} takes {', '.join(sorted(names))}, not {entry!r}: {hint}")
            found.append(known)
        return tuple(sorted(set(found)))

    return check


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A name or some names, sorted, each once."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple, set, frozenset)) or not all(isinstance(e, str) and e for e in entries):
        raise ConstraintError(f"{name} must be a name or a list of names, not {value!r}")
    return tuple(sorted(set(entries)))


def count(name: str, value: Any) -> int | None:
    """A whole number of at least 1, or None."""
    return None if value is None else whole(name, value, least=1)


def count_or_none(name: str, value: Any) -> int:
    """A whole number of at least 0; None stands for 0."""
    return 0 if value is None else whole(name, value, least=0)


def whole(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """A whole number within bounds."""
    bad = isinstance(value, bool) or not isinstance(value, int) or value < least
    if bad or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConstraintError(f"{name} must be a whole number {bounds}, not {value!r}")
    return int(value)


def between(least: int, most: int) -> Check:
    """A whole number from `least` to `most`."""
    return lambda name, value: whole(name, value, least=least, most=most)


def widths(name: str, value: Any) -> int | tuple[int, ...] | None:
    """A whole number, or one a stage."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ConstraintError(f"{name} must be a whole number or one number a stage, not an empty list")
        return tuple(count(name, entry) or 1 for entry in value)
    return count(name, value)


def amount(unit: str) -> Check:
    """A finite number above 0, or None."""

    def check(name: str, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ConstraintError(f"{name} must be a number of {unit} above 0, not {value!r}")
        return float(value)

    return check


def flag(name: str, value: Any) -> bool:
    """True or False; the words "true" and "false" stand for them, as a command line gives them."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ConstraintError(f"{name} must be true or false, not {value!r}")
    return value


def replicas(name: str, value: Any) -> int | str | None:
    """How many rings: a whole number of at least 1, or "auto" (True says the same, False stands for 1), or None."""
    if value is None:
        return None
    if isinstance(value, str) and value.lower() in ("auto", "true", "false"):
        return 1 if value.lower() == "false" else "auto"
    if isinstance(value, bool):
        return "auto" if value else 1
    try:
        return whole(name, value, least=1)
    except ConstraintError:
        raise ConstraintError(f'{name} must be a whole number of at least 1, or "auto", not {value!r}') from None
