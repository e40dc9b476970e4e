"""What the end-to-end tests share: prompts, fleets of real peers, and jobs on them."""

import contextlib
import importlib.util
from pathlib import Path

import pytest

import mesh
from simulations.processes import Fleet, SiteSpec, wait_converged

MODEL = Path(__file__).resolve().parents[2] / ".models" / "SmolLM2-135M-Instruct"
#: Five prompts of different length and kind. Each is continued for TOKENS tokens, whatever the model says of its end.
PROMPTS = (
    "Once upon a time",
    "The three laws of robotics are",
    "def fibonacci(n):\n",
    [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}],
    "A long road led from the harbour to the old town, past gardens, walls and a mill that had not turned for years. "
    "Two travellers walked along it in the evening, and the elder said:",
)
TOKENS = 64
#: Stated rather than measured: a plan then depends on nothing but the test, and no peer spends seconds on calibration.
SPEED = "flops=50e9,bandwidth=10e9"
CONVERGE_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 120.0


@contextlib.contextmanager
def converged(sites, **settings):
    """A fleet whose first site sees all others, and a client of that site."""
    owner = sites[0].name
    rtts_ms = settings.pop("rtts_ms", None)
    with Fleet(sites, rtts_ms=rtts_ms, settings=settings) as fleet:
        wait_converged(fleet, owner, CONVERGE_TIMEOUT_S)
        with mesh.connect(fleet.address(owner)) as client:
            yield fleet, client


@contextlib.contextmanager
def running(client, model, constraints, strategy="auto"):
    """A job that is ready, and that is cancelled afterwards."""
    job = client.submit(model, strategy, {"dtype": "float32", "context": 1024, **constraints})
    try:
        job.wait(READY_TIMEOUT_S)
        yield job
    finally:
        with contextlib.suppress(mesh.MeshError):
            job.cancel()


def device(memory="1500MiB", count=1):
    """So many equal one-thread devices."""
    return tuple(f"cpu,threads=1,memory={memory},{SPEED}" for _ in range(count))


def site(name, **kwargs):
    return SiteSpec(name, device(**kwargs))


def needs(transport):
    """Skip where a backend cannot be there: UCX ships wheels for Linux only."""
    if transport == "ucx" and importlib.util.find_spec("ucxx") is None:
        pytest.skip("UCX is not installed (extra `ucx`, Linux only)")
