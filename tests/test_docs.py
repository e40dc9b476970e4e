"""What the pages tell people to type works: every command, every piece of Python, every configuration.

Each page is walked in its own empty folder, with addresses mapped to free ports. `mesh up` starts a real peer that
lives until the page ends; other commands of a block run as one shell script; Python runs as a script of its own. `make`
targets and `mesh demo` are only checked to exist: CI runs them beside the tests. A block that must not run says why, as
in "```sh skip=needs two machines".
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mesh.peer.config import load
from simulations.processes import free_ports

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = re.compile(r"127\.0\.0\.1:(\d+)")
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
DEFAULT_PORT = "7700"
UP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 180.0
LEAVE_TIMEOUT_S = 30.0
#: Languages of blocks that are shown, not run.
SHOWN = {"text", "json", "toml"}


def blocks(page):
    """(language, reason not to run it, body) of each fenced block."""
    for match in FENCE.finditer(page.read_text()):
        language, _, rest = match["info"].partition(" ")
        yield language, rest.removeprefix("skip=") if rest.startswith("skip") else None, match["body"]


class Reader:
    """Somebody who types what a page says."""

    def __init__(self, folder):
        self.folder = folder
        (folder / ".models").symlink_to(ROOT / ".models")
        self.ports = {}
        self.peers = []
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MESH_DATA_DIR": str(folder / "default"),
            "MESH_LISTEN": self.mapped(f"127.0.0.1:{DEFAULT_PORT}"),
            "MESH_PEER": self.mapped(f"127.0.0.1:{DEFAULT_PORT}"),
        }

    def mapped(self, text):
        def port(match):
            number = match[1]
            if number not in self.ports:
                (self.ports[number],) = free_ports(1)
            return f"127.0.0.1:{self.ports[number]}"

        return ADDRESS.sub(port, text)

    def shell(self, body):
        script = []
        for line in self.mapped(body).splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["mesh", "up"]:
                self.up(words)
            elif words[:2] == ["mesh", "demo"]:
                self.run(["mesh", "demo", "--help"])
            elif words[:1] == ["make"]:
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=60)
            else:
                script.append(line)
        if any(line.strip() for line in script):
            self.run(["bash", "-euo", "pipefail", "-c", "\n".join(script)])

    def python(self, body):
        # The interpreter of the tests holds warnings to be errors; so does the reader's.
        self.run([sys.executable, "-W", "error", "-c", self.mapped(body)])

    def up(self, words):
        log = self.folder / f"peer{len(self.peers)}.log"
        with log.open("wb") as sink:
            peer = subprocess.Popen(
                words, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=sink,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.peers.append(peer)
        deadline = time.monotonic() + UP_TIMEOUT_S
        while " is up at " not in log.read_text(errors="replace"):
            assert peer.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.1)

    def run(self, command):
        result = subprocess.run(
            command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"

    def close(self):
        """Every peer leaves when it is told to, with exit code 0."""
        codes = []
        for peer in self.peers:
            with contextlib.suppress(ProcessLookupError):
                peer.terminate()
        for peer in self.peers:
            try:
                codes.append(peer.wait(LEAVE_TIMEOUT_S))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(peer.pid, 9)
        assert codes == [0] * len(codes)


@pytest.fixture
def reader(tmp_path):
    reader = Reader(tmp_path)
    with contextlib.closing(reader):
        yield reader


@pytest.mark.e2e
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_tells_to_type_works(page, reader):
    todo = [block for block in blocks(page) if block[0] not in SHOWN]
    needs_peer = any("mesh.submit(" in body for _, _, body in todo)
    if needs_peer and not any(line.strip() == "mesh up" for _, _, body in todo for line in body.splitlines()):
        reader.up(["mesh", "up"])
    for language, skipped, body in todo:
        if skipped is None:
            {"sh": reader.shell, "python": reader.python}[language](body)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_language_and_a_skipped_one_a_reason(page):
    for language, skipped, body in blocks(page):
        assert language in {"sh", "python", *SHOWN}, body
        assert skipped is None or len(skipped.split()) > 1, f"say why this block is not run:\n{body}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_shown_is_accepted(page, tmp_path):
    for language, _, body in blocks(page):
        if language == "toml":
            path = tmp_path / "peer.toml"
            path.write_text(body)
            assert load({}, {}, path).site


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
