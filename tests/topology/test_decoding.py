"""Where what a layer costs was measured, that is what a plan counts with."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from meshes import SMOL, cpu, mesh, site

from topology import partition
from topology.constraints import Constraints
from topology.cost import LAYER_OVERHEAD_S, fit
from topology.picture import Picture, look
from topology.plan import Predicted
from topology.snapshot import Decoding, Device, Snapshot, device_from

MEASURED = {"float32": Decoding(layer_s=1e-4, row_s=5e-8, bandwidth=20e9)}


def _picture(*devices: Device) -> Picture:
    return look(mesh([site("a", *devices)], {}), SMOL, Constraints())


def test_rows_and_bytes_and_the_call_are_all_counted() -> None:
    (node,) = _picture(cpu(decoding=MEASURED)).nodes["a"]
    rows, weights = 15 * 64 + 2 * 1536, SMOL.layer_bytes - 2 * SMOL.row_bytes
    assert weights / node.speed == pytest.approx(rows * 5e-8 + weights / 20e9)
    assert node.layer_s == pytest.approx(1e-4 + 2 * 576 * 5e-8)


def test_a_plan_takes_what_its_layers_were_measured_to_take() -> None:
    plan = partition(mesh([site("a", cpu(memory=2**31, decoding=MEASURED))], {}), SMOL, {"context": 2})
    rows = 15 * 64 + 2 * 1536 + 2 * 576
    weights = SMOL.layer_bytes - 2 * SMOL.row_bytes
    layer_s = 1e-4 + rows * 5e-8 + weights / 20e9
    assert plan.predicted.compute_ms == pytest.approx(30e3 * layer_s + 1e3 * SMOL.embedding_bytes / 14.6e9, rel=0.03)


def test_a_shard_saves_only_what_it_is_cut_in() -> None:
    picture = _picture(cpu("x", decoding=MEASURED), cpu("y"))
    both = fit(picture, SMOL, 128, picture.nodes["a"], "speed", first=True, last=True)
    unmeasured = _picture(cpu("x"), cpu("y"))
    neither = fit(unmeasured, SMOL, 128, unmeasured.nodes["a"], "speed", first=True, last=True)
    assert both is not None and neither is not None
    slowest = max(LAYER_OVERHEAD_S, 1e-4 + 2 * 576 * 5e-8)
    assert neither.layer_s > LAYER_OVERHEAD_S
    assert both.layer_s > slowest


def test_a_stage_that_waits_for_the_others_wakes_up_each_time() -> None:
    sleepy = {"float32": replace(MEASURED["float32"], waking_s=2e-3)}
    model, wanted = SMOL, {"context": 128, "shards": [1, 1], "sites": ["a", "b"]}

    def predicted(decoding: dict[str, Decoding], memory: int, constraints: dict[str, object]) -> Predicted:
        sites = [site(name, cpu(memory=memory, decoding=decoding)) for name in "ab"]
        return partition(mesh(sites, {"a-b": 10.0}), model, constraints).predicted

    quick, slow = (predicted(decoding, 2**30, wanted) for decoding in (MEASURED, sleepy))
    assert slow.compute_ms == pytest.approx(quick.compute_ms + 2 * 2.0)
    assert slow.network_ms == pytest.approx(quick.network_ms)
    alone = {"context": 128, "shards": [1]}
    assert predicted(MEASURED, 2**31, alone) == predicted(sleepy, 2**31, alone)


def test_a_busy_device_takes_longer_for_all_of_it() -> None:
    (idle,), (busy,) = (_picture(cpu(decoding=MEASURED, load=load)).nodes["a"] for load in (0.0, 0.5))
    assert busy.layer_s == 2 * (idle.layer_s or 0)
    assert busy.speed == idle.speed / 2


def test_another_dtype_is_not_taken_for_measured() -> None:
    (node,) = _picture(cpu(decoding={"bfloat16": MEASURED["float32"]})).nodes["a"]
    assert node.layer_s is None
    assert node.speed == 15e9


@pytest.mark.parametrize(
    "changes", [{"layer_s": -1.0}, {"row_s": 2.0}, {"waking_s": -1.0}, {"bandwidth": 0.0}, {"bandwidth": 1e30}]
)
def test_impossible_times_do_not_count_and_are_told(changes: dict[str, float]) -> None:
    measured = Decoding(**{**asdict(MEASURED["float32"]), **changes})
    picture = _picture(cpu(decoding={"float32": measured}))
    assert picture.nodes["a"][0].layer_s is None
    assert any("impossible times of float32 layers" in note for note in picture.notes)


def test_it_survives_the_document_and_old_documents_are_read() -> None:
    snapshot = mesh([site("a", cpu(decoding=MEASURED))], {})
    assert Snapshot.from_dict(snapshot.to_dict()) == snapshot
    old = asdict(cpu())
    del old["decoding"]
    assert device_from(old).decoding == {}
