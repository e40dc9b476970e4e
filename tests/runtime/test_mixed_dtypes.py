"""Shards and stages that hold their weights in different dtypes, as planned: one exchange, one answer."""

from dataclasses import replace

import pytest
import torch
from small_models import COLUMNS, LAYERS, Ring, build, shards, whole

from mesh.runtime.assignment import assignments
from topology import Device, Link, ModelSpec, Site, Snapshot, partition

PROMPT = [5, 17, 33, 60, 8, 91, 44]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("qwen2").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exact(folder):
    """The checkpoint's bfloat16 numbers, computed in float32."""
    return Ring([[whole(folder)]]).step(0, PROMPT)


def near(found, exact):
    return torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.995


def test_a_plan_of_two_stages_in_two_dtypes_runs(folder, exact):
    """One site decodes bfloat16 slowly and has room for float32, the other is as fast in either and has little room."""
    model = ModelSpec("tiny", LAYERS, 48, 6, 3, 8, COLUMNS, 97, False, "bfloat16", 64)

    def site(name, memory, flops):
        device = Device("cpu0", "cpu", "x", memory, memory, flops, 1e6, 0.0)
        return Site(name, "", (device,))

    old, new = {"float32": 1e9, "bfloat16": 1e5}, {"float32": 1e9, "bfloat16": 1e9}
    snapshot = Snapshot(
        (site("old", 700_000, old), site("new", 260_000, new)),
        (Link("old", "new", 1e-3, bandwidth=1e9), Link("new", "old", 1e-3, bandwidth=1e9)),
    )
    plan = partition(snapshot, model, {"dtype": "auto", "stages": 2, "shards": 1, "objective": "latency"})
    made = assignments(plan, job="job", epoch=(1, "a"), model=str(folder))
    assert {a.dtype for a in made.values()} == {"float32", "bfloat16"}
    assert {a.wire_dtype for a in made.values()} == {"bfloat16"}
    stages = [[replace(made[shard.key], device="cpu", threads=1) for shard in stage.shards] for stage in plan.stages]
    ring = Ring(stages)
    assert near(ring.step(0, PROMPT), exact)
    states = ring.stages[0][0].forward("other", 0, tokens=PROMPT)
    assert states.dtype == getattr(torch, stages[0][0].dtype)


@pytest.mark.parametrize("general", [False, True])
def test_shards_of_one_stage_may_hold_different_dtypes_and_agree(folder, exact, general):
    a = whole(folder, wire_dtype="bfloat16")
    two = shards(a, cuts=[0, 2, 3], columns=[0, 50, COLUMNS], vocabulary=[0, 40, 97])
    ring = Ring([[two[0], replace(two[1], dtype="bfloat16")]], general=general)
    assert near(ring.step(0, PROMPT), exact)
    assert near(ring.step(len(PROMPT), [7]), Ring([[whole(folder)]]).step(0, [*PROMPT, 7]))


def test_one_dtype_for_all_is_exchanged_as_it_is(folder):
    two = {"cuts": [0, 2, 3], "columns": [0, 50, COLUMNS], "vocabulary": [0, 40, 97]}
    named = Ring([shards(whole(folder, wire_dtype="float32"), **two)]).step(0, PROMPT)
    assert torch.equal(named, Ring([shards(whole(folder), **two)]).step(0, PROMPT))
