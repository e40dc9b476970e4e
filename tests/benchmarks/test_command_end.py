"""A benchmark whose reader goes away ends with 141 and without a trace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.command import command


def test_a_reader_that_goes_away_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.planner", "--sites", "2", "--devices", "1", "--needs", "1"],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")


def test_the_exit_code_is_that_of_main() -> None:
    for given, code in ((None, 0), (0, 0), (2, 2)):
        with pytest.raises(SystemExit) as ended:
            command(lambda given=given: given)  # type: ignore[misc]
        assert ended.value.code == code


def test_an_interrupt_leaves_no_trace() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command(interrupted)
    assert ended.value.code == 130
