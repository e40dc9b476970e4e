"""Regenerate `mesh/wire` from `proto/`: messages, gRPC stubs, and types for both. The result is committed."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run protoc over every contract; returns its exit code."""
    contracts = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    arguments = [
        f"-I{ROOT / 'proto'}",
        *(f"--{name}_out={ROOT}" for name in ("python", "mypy", "grpc_python", "mypy_grpc")),
    ]
    return int(protoc.main(["protoc", *arguments, *contracts]))


if __name__ == "__main__":
    sys.exit(main())
