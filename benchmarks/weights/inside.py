"""`python -m benchmarks.weights.inside NAMESPACE MODULE ARGUMENT...`: run a module inside a network namespace."""

from __future__ import annotations

import runpy
import sys

from simulations.wide_area import enter

if __name__ == "__main__":
    space, module, *rest = sys.argv[1:]
    enter(space)
    sys.argv[1:] = rest
    runpy.run_module(module, run_name="__main__", alter_sys=True)
