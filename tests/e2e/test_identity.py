"""A cluster as its operator meets it: made, joined by invitation, used with tokens, rotated, and a site put out."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from drills import MODEL

from simulations.processes import free_ports

pytestmark = pytest.mark.e2e

MESH = (sys.executable, "-c", "import sys; from mesh.cli import main; sys.exit(main())")
DEVICE = "cpu,threads=1,memory=700MiB,flops=50e9,bandwidth=10e9"
WITHIN_S = 30.0


class Site:
    """One peer of the cluster, as its own process."""

    def __init__(self, root, name, port):
        self.name, self.data, self.address = name, root / name, f"127.0.0.1:{port}"
        self.log = root / f"{name}.log"
        self.process = None

    def up(self, *options):
        arguments = ["up", "--site", self.name, "--data-dir", str(self.data), "--listen", self.address]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*MESH, *arguments, "--device", DEVICE, *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return self

    def run(self, *arguments, token=None, code=0):
        """A command with this peer's own local token, or another; its output."""
        environment = {**os.environ, "MESH_TOKEN": token or str(self.data / "identity" / "local.token")}
        done = subprocess.run(
            [*MESH, *arguments, "--peer", self.address],
            check=False, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr + self.log.read_text()
        return done.stdout.strip() if code == 0 else done.stderr.strip()

    def members(self):
        try:
            document = json.loads(self.run("members", "--json"))
        except AssertionError:
            return {}
        return {member["site"]: member["state"] for member in document["members"]}

    def ring(self):
        return json.loads(self.run("members", "--json"))["identity"]["ring"]

    def end(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def command(*arguments):
    """A command that may fail: what became of it."""
    return subprocess.run([*MESH, *arguments], check=False, capture_output=True, text=True, timeout=60)


def until(true, what):
    end = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.3)


@pytest.fixture(name="cluster", scope="module")
def _cluster(tmp_path_factory):
    """Three sites: `ams` holds the authority, `fra` and `nyc` were invited."""
    root = tmp_path_factory.mktemp("cluster")
    sites = [Site(root, name, port) for name, port in zip(("ams", "fra", "nyc"), free_ports(3), strict=True)]
    try:
        ams = sites[0]
        create = [*MESH, "cluster", "create", "lab", "--site", "ams", "--data-dir", str(ams.data)]
        subprocess.run(create, check=True, capture_output=True, timeout=60)
        ams.up()
        until(lambda: ams.members() == {"ams": "alive"}, "ams is not up")
        for site in sites[1:]:
            site.up("--invite", ams.run("invite", "--site", site.name))
        everybody = {site.name: "alive" for site in sites}
        until(lambda: all(site.members() == everybody for site in sites), [site.log.read_text() for site in sites])
        yield sites
    finally:
        for site in sites:
            site.end()


def test_private_keys_are_read_by_their_owner_alone(cluster):
    for site in cluster:
        folder = site.data / "identity"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert not (cluster[1].data / "authority").exists()


def test_a_job_runs_over_members_and_a_role_bounds_what_a_token_opens(cluster):
    ams, fra, _ = cluster
    looker = ams.run("token", "create", "looker", "--role", "observe")
    worker = ams.run("token", "create", "worker", "--role", "submit")
    assert "needs 'submit'" in fra.run("submit", str(MODEL), token=looker, code=16)
    assert json.loads(fra.run("status", "--json", token=looker))["site"] == "fra"
    options = ["--constraint", "stages=2", "--constraint", "context=128", "--constraint", "dtype=float32"]
    said = fra.run("generate", "--model", str(MODEL), "The sea is", "--max-tokens", "6", *options, token=worker)
    assert said
    assert "needs 'administer'" in ams.run("rotate", token=worker, code=16)


def test_without_a_token_and_with_anothers_local_token_nothing_is_told(cluster):
    ams, fra, _ = cluster
    assert "error:" in fra.run("status", token=str(ams.data / "identity" / "local.token"), code=15)


def test_an_invitation_is_good_once_and_for_its_name_only(cluster, tmp_path):
    ams = cluster[0]
    token = ams.run("invite", "--site", "osl")
    wrong = command(
        "up", "--site", "rom", "--data-dir", str(tmp_path / "rom"), "--listen", "127.0.0.1:0", "--invite", token
    )
    assert wrong.returncode != 0 and "osl" in wrong.stderr
    used = ams.run("invite")
    osl = Site(tmp_path, "osl", free_ports(1)[0]).up("--invite", used)
    try:
        until(lambda: "osl" in osl.members(), osl.log.read_text())
    finally:
        os.killpg(osl.process.pid, signal.SIGTERM)
        osl.process.wait(30)
    again = command(
        "up", "--site", "par", "--data-dir", str(tmp_path / "par"), "--listen", "127.0.0.1:0", "--invite", used
    )
    assert again.returncode == 15 and "used" in again.stderr


def test_a_rotation_reaches_all_and_nobody_is_lost_meanwhile(cluster):
    ams = cluster[0]
    before = ams.ring()
    ams.run("rotate")
    until(lambda: all(site.ring() == before + 1 for site in cluster), "the new ring did not reach all")
    states = [state for site in cluster for name, state in site.members().items() if name in ("ams", "fra", "nyc")]
    assert set(states) <= {"alive", "suspect"}


def test_a_revoked_site_is_dead_to_the_others_and_cannot_come_back(cluster):
    ams, fra, nyc = cluster
    ams.run("revoke", "nyc")
    until(lambda: ams.members().get("nyc") == "dead" and fra.members().get("nyc") == "dead", "nyc is still heard")
    nyc.end()
    nyc.up()
    time.sleep(3)
    assert ams.members().get("nyc") == "dead"
    assert ams.members().get("fra") == "alive"


def test_a_peer_without_an_identity_may_not_listen_beyond_loopback(tmp_path):
    done = command("up", "--data-dir", str(tmp_path / "x"), "--listen", "0.0.0.0:7799")
    assert done.returncode == 12


def test_a_restarted_site_finds_the_mesh_by_itself_without_seeds_and_under_its_name(cluster):
    ams, fra, _ = cluster
    time.sleep(6)  # whom it knows is written down every five seconds
    fra.end()
    until(lambda: ams.members().get("fra") == "dead", "fra is not missed")
    fra.up()
    until(lambda: fra.members().get("ams") == "alive" and ams.members().get("fra") == "alive", fra.log.read_text())
