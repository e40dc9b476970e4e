"""What layers cost is fitted to what was measured, in the workers' own code, within the memory that is free."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from mesh.devices import layers
from mesh.devices.calibration import Busy
from mesh.devices.exchange import LAYERS, Company, Partner, judged
from mesh.devices.layers import Sample, decoding, fit, waking_s


def test_what_times_follow_is_found_out() -> None:
    samples = (Sample(512, 4, 1536), Sample(512, 4, 1536, 4), Sample(2048, 16, 5632))
    measured = [(each, 2e-4 + each.rows * 5e-8 + 4 * each.weights / 2e10) for each in samples]
    found = fit(measured, 4)
    assert (found.layer_s, found.row_s, found.bandwidth) == pytest.approx((2e-4, 5e-8, 2e10))


def test_no_figure_is_negative_or_infinite_whatever_was_measured() -> None:
    shrinking = [(Sample(512, 4, 1536), 1e-3), (Sample(512, 4, 1536, 4), 1e-2), (Sample(2048, 16, 5632), 1e-4)]
    found = fit(shrinking, 2)
    assert found.layer_s >= 0 <= found.row_s
    assert 0 < found.bandwidth <= 1e15


def test_real_layers_are_run_and_memory_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(layers, "_CPU", (Sample(64, 2, 128), Sample(64, 2, 128, 2), Sample(128, 2, 256)))
    runs = []

    def typical(run: Callable[[], object]) -> float:
        runs.append(run())
        return 1e-3 * len(runs)

    with torch.inference_mode():
        assert decoding(torch, "cpu", "float32", 2**24, typical) is not None
        assert [tuple(x.shape) for x in runs] == 3 * [(1, 64), (1, 64), (1, 128)]
        assert all(bool(torch.isfinite(x).all()) for x in runs)
        assert decoding(torch, "cpu", "float32", 2**20, typical) is None


def test_a_machine_too_busy_to_be_measured_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(layers, "_CPU", (Sample(64, 2, 128), Sample(64, 2, 128, 2), Sample(128, 2, 256)))
    runs = []

    def slow(step_s: float) -> Callable[[], float]:
        now = iter(range(100))
        return lambda: step_s * next(now)

    def typical(run: Callable[[], object]) -> float:
        runs.append(run)
        return 1e-3

    with torch.inference_mode():
        for step_s, begun in ((0.02, 0), (0.009, 9), (0.9, 0)):
            runs.clear()
            if begun:
                assert decoding(torch, "cpu", "float32", 2**24, typical, clock=slow(step_s)) is not None
            else:
                with pytest.raises(Busy):
                    decoding(torch, "cpu", "float32", 2**24, typical, clock=slow(step_s))
            assert len(runs) == begun


def test_waking_is_what_a_step_takes_longer_after_a_rest_than_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(layers, "_CPU", (Sample(64, 2, 128),))
    # Looked at before the step after a rest, after it, and after the next step: 3 ms and 1 ms.
    looks = itertools.accumulate(itertools.cycle((1.0, 3e-3, 1e-3)))
    rests: list[float] = []
    with torch.inference_mode():
        found = waking_s(torch, "float32", 2**24, clock=lambda: next(looks), sleep=rests.append)
        assert found == pytest.approx(2e-3)
        assert rests and min(rests) > 0
        assert waking_s(torch, "float32", 0, clock=lambda: next(looks), sleep=rests.append) == 0.0


def test_an_exchange_is_what_a_step_takes_beyond_computing_in_company() -> None:
    alone, beside = [1e-2] * 8, [1.2e-2] * 8
    found = judged(alone, beside, [1.2e-2 + 2 * LAYERS * 5e-5] * 6 + [9e-1] * 2)
    assert found.together == pytest.approx(1.2)
    assert found.exchange_s == pytest.approx(5e-5)
    assert judged(alone, beside, [9e-1] * 8).exchange_s is None  # a busy machine, not the loopback
    assert judged(alone, beside, beside).exchange_s is None
    assert judged(alone, [9e-1] * 8, [9e-1] * 8) == Company()
    assert judged(beside, alone, beside).together == 1.0  # nobody is faster for company


def test_two_real_processes_compute_together_or_say_that_they_could_not() -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    try:
        with Partner() as partner:
            assert partner.ready()
            found = [partner.company(torch, dtype) for dtype in ("float32", "bfloat16")]
    finally:
        torch.set_num_threads(threads)
    for each in found:
        assert each.exchange_s is None or 1e-6 <= each.exchange_s <= 1e-3
        assert each.together is None or each.together >= 1.0


def test_a_partner_that_ends_at_once_is_no_exchange() -> None:
    with Partner(("true",)) as partner:
        assert partner.company(None, "float32") == Company()
