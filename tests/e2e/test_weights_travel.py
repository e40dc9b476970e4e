"""A model that lies at one site runs over three: nobody copies it, a dead source costs nothing, nothing comes twice."""

import shutil
import time

from drills import CONVERGE_TIMEOUT_S, READY_TIMEOUT_S, SPEED

import mesh
from simulations.processes import Fleet, SiteSpec, wait_converged

#: Three of these hold the tiny model with its caches, two do not.
DEVICE = (f"cpu,threads=1,memory=16MiB,{SPEED}",)
#: The sources give so little that a fetch takes seconds, and can lose one of them meanwhile.
SLOW = {"weights_rate": "1MB"}
WISHES = {"dtype": "float32"}


def held(fleet, site):
    """The rows of the models that a site tells of, by whether they came from others."""
    with mesh.connect(fleet.address(site)) as client:
        return {row["cached"]: row for row in client.status()["models"]}


def ready(client, **wishes):
    job = client.submit("tiny", "auto", {**WISHES, **wishes})
    job.wait(READY_TIMEOUT_S)
    return job


def test_a_model_of_one_site_runs_over_three_and_is_fetched_once_though_a_source_dies(tiny, tmp_path):
    for name in ("owner", "second"):
        shutil.copytree(tiny, tmp_path / name / "tiny")
    (tmp_path / "empty").mkdir()
    empty = {"models": str(tmp_path / "empty")}
    sites = [
        SiteSpec("a", DEVICE, settings={"models": str(tmp_path / "owner"), **SLOW}),
        SiteSpec("b", DEVICE, settings=empty),
        SiteSpec("c", DEVICE, settings=empty),
        # Has the model and lends no device worth using: a source and nothing else.
        SiteSpec("d", (f"cpu,threads=1,memory=1MiB,{SPEED}",), settings={"models": str(tmp_path / "second"), **SLOW}),
    ]
    with Fleet(sites) as fleet:
        wait_converged(fleet, "a", CONVERGE_TIMEOUT_S)
        with mesh.connect(fleet.address("a")) as client:
            job = client.submit("tiny", "auto", WISHES)
            deadline = time.monotonic() + READY_TIMEOUT_S
            while not any(row.get("root") for row in held(fleet, "d").values()):
                assert time.monotonic() < deadline, "d was never asked for the model"
                time.sleep(0.1)
            fleet.kill("d")
            job.wait(READY_TIMEOUT_S)
            assert set(job.plan.ring) == {"a", "b", "c"}
            tokens = job.generate([5, 6, 7], max_tokens=16, ignore_eos=True).token_ids
            rows = {site: held(fleet, site)[True] for site in ("b", "c")}
            assert all(row["in_use"] for row in rows.values())
            job.cancel()
            # The second time everything is there: at 1 MB/s a fetch would take seconds and change what is held.
            job = ready(client)
            assert job.generate([5, 6, 7], max_tokens=16, ignore_eos=True).token_ids == tokens
            if set(job.plan.ring) == {"a", "b", "c"}:
                after = {site: held(fleet, site)[True]["bytes"] for site in ("b", "c")}
                assert all(after[site] >= rows[site]["bytes"] for site in after)
            job.cancel()
        # What b has names the model there, so that b can own a job of it.
        with mesh.connect(fleet.address("b")) as client:
            job = ready(client)
            assert job.generate([5, 6, 7], max_tokens=16, ignore_eos=True).token_ids == tokens
            job.cancel()
    whole = [SiteSpec("alone", (f"cpu,threads=1,memory=200MiB,{SPEED}",))]
    with Fleet(whole) as fleet:
        wait_converged(fleet, "alone", CONVERGE_TIMEOUT_S)
        with mesh.connect(fleet.address("alone")) as client:
            job = client.submit(str(tiny), "auto", WISHES)
            job.wait(READY_TIMEOUT_S)
            assert job.generate([5, 6, 7], max_tokens=16, ignore_eos=True).token_ids == tokens
