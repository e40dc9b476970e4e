"""What a person sees on a terminal: a bar while weights load, a summary after a text. Neither ever touches stdout."""

import os
import pty
import subprocess
import sys

from mesh.cli import main

MESH = [sys.executable, "-m", "mesh.cli"]


def on_terminal(*arguments: str) -> tuple[int, bytes, bytes]:
    """Exit code, stdout (a pipe) and stderr (a terminal)."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([*MESH, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    err = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # EIO: the other side has closed
            break
        if not piece:
            break
        err += piece
    os.close(ours)
    out, _ = process.communicate(timeout=20)
    return process.returncode, out, err


def test_a_bar_shows_while_weights_load(peer):
    code, out, err = on_terminal("submit", "org/model")
    assert (code, out) == (0, b"job-1\n")
    assert b"3.0/3.0 MiB" in err and b"ready" in err and b"pipeline over berlin -> oslo" in err


def test_a_failure_while_loading_is_one_line_below_the_bar(peer):
    code, out, err = on_terminal("submit", "bad/worker")
    assert (code, out) == (14, b"") and err.rstrip().endswith(b"error: cpu:0 ran out of memory")


def test_a_summary_follows_the_text(peer, capsys):
    main(["submit", "org/model"])
    code, out, err = on_terminal("generate", "job-1", "The", "--temperature", "1", "--seed", "7")
    assert (code, out) == (0, b"The sea is wide and old.\n")
    assert err.strip() == b"7 tokens, 50.0 tokens/s, ended by length, seed 7"
