"""What sites tell each other of the models they hold: gossip's entry "held", written and read.

    {"models": [{"root", "name", "layers": [[start, end]...], "whole", "bytes", "total", "cached"}...],
     "cache": {"used", "limit"}}

`root` is empty for files that nobody has hashed yet. `total` is 0 where it is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The key of gossip's entry.
HELD = "held"
#: What a site tells the mesh: so many models, so many runs of layers of each; some 150 bytes a model.
MAX_HELD, MAX_RUNS = 48, 8
#: Roots are told whole: who has nothing of a model yet can fetch it by its name.
ROOT_BYTES = 32
#: More than any disk: what a site may claim.
MAX_BYTES = 1 << 60
_MAX_LAYERS = 1 << 20
_MAX_NAME = 200


def of_store(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of one row of the store's."""
    runs = sorted(row["layers"], key=lambda run: run[0] - run[1])[:MAX_RUNS]
    return {
        "root": row["root"],
        "name": row["name"],
        "layers": sorted(runs),
        "whole": row["bytes"] == row["total_bytes"],
        "bytes": row["bytes"],
        "total": row["total_bytes"],
        "cached": row["cached"],
    }


def of_folder(name: str, size: int) -> dict[str, Any]:
    """What is told of a folder that was opened and not hashed. size: of its files, 0 where that is not known."""
    layers = [[0, _MAX_LAYERS]]
    return {"root": b"", "name": name, "layers": layers, "whole": True, "bytes": size, "total": size, "cached": False}


def read_held(entry: Any) -> list[dict[str, Any]]:
    """What a site tells of its models, as far as an honest peer could have told it."""
    found: list[dict[str, Any]] = []
    rows = entry.get("models") if isinstance(entry, Mapping) else None
    for row in rows[:MAX_HELD] if isinstance(rows, list) else ():
        try:
            runs = [(int(start), int(end)) for start, end in row["layers"][:MAX_RUNS]]
            root, name = bytes(row["root"]), str(row["name"])
            size, total = _bytes(row.get("bytes")), _bytes(row.get("total"))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if len(root) in (0, ROOT_BYTES) and len(name) <= _MAX_NAME and all(0 <= a < b <= _MAX_LAYERS for a, b in runs):
            found.append({
                "root": root, "name": name, "layers": runs, "whole": bool(row.get("whole")),
                "bytes": size, "total": total, "cached": row.get("cached") is True,
            })  # fmt: skip
    return found


def read_cache(entry: Any) -> dict[str, int]:
    """What a site tells of its cache: bytes used, and the limit; empty where it tells nothing that makes sense."""
    told = entry.get("cache") if isinstance(entry, Mapping) else None
    try:
        return {"used_bytes": _bytes(told["used"]), "limit_bytes": _bytes(told["limit"])}  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}


def described(site: str, entry: Any) -> dict[str, Any]:
    """One site's part of `mesh models`."""
    models = [
        {
            "name": row["name"],
            "root": row["root"].hex(),
            "whole": row["whole"],
            "layers": [] if row["whole"] else [list(run) for run in row["layers"]],
            "bytes": row["bytes"],
            "total_bytes": row["total"],
            "cached": row["cached"],
        }
        for row in read_held(entry)
    ]
    return {"site": site, "models": models, "cache": read_cache(entry)}


def models_below(folder: Path) -> list[Path]:
    """The models that lie in a folder: folders with a config.json."""
    try:
        return sorted(path.parent for path in folder.glob("*/config.json"))
    except OSError:
        return []


def size_of(path: str) -> int:
    """The bytes of the files in a model's folder; 0 where it is none."""
    try:
        return sum(each.stat().st_size for each in Path(path).expanduser().iterdir() if each.is_file())
    except (OSError, RuntimeError, ValueError):
        return 0


def _bytes(value: Any) -> int:
    number = int(value or 0)
    if not 0 <= number <= MAX_BYTES:
        raise ValueError(f"{number} bytes")
    return number
