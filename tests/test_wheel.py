"""What the wheel ships: its top level is pinned, so that no stray folder ever lands in site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"mesh", "transport", "topology", "simulations"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The paths inside a wheel built from the files git knows or would add."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    built = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_top_level_is_pinned(names):
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert sum(name.endswith(".dist-info") for name in top) == 1


def test_every_package_says_that_it_is_typed(names):
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


def test_the_licence_and_the_generated_wire_code_are_in_it(names):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "mesh/wire/v1/mesh_pb2.py" in names
