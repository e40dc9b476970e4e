"""Sampling: a pure function of logits, options, seed and index, with the distribution that was asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RequestError
from mesh.runtime.sampling import sample, uniform

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -5.0])


def test_temperature_zero_takes_the_first_of_the_highest():
    assert sample(LOGITS) == 1


def test_the_numbers_are_fixed_for_ever():
    assert [round(uniform(7, index), 6) for index in range(3)] == [0.728348, 0.803338, 0.244195]


def test_the_same_seed_and_index_draw_the_same_token():
    options = {"temperature": 1.0, "seed": 3}
    first = [sample(LOGITS, index=index, **options) for index in range(50)]
    assert first == [sample(LOGITS, index=index, **options) for index in range(50)]
    assert first != [sample(LOGITS, index=index, temperature=1.0, seed=4) for index in range(50)]


def test_draws_follow_the_softmax():
    drawn = np.bincount([sample(LOGITS, temperature=0.7, index=i) for i in range(8000)], minlength=5) / 8000
    wanted = torch.softmax(LOGITS.double() / 0.7, 0).numpy()
    assert np.abs(drawn - wanted).max() < 0.02


def test_top_k_and_top_p_leave_the_rest_out():
    assert {sample(LOGITS, temperature=5.0, top_k=2, index=i) for i in range(300)} == {1, 3}
    assert {sample(LOGITS, temperature=1.0, top_p=0.5, index=i) for i in range(300)} == {1, 3}
    assert {sample(LOGITS, temperature=1.0, top_k=1, index=i) for i in range(20)} == {1}


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=3000),
    st.floats(0, 4),
    st.floats(0.01, 1),
    st.integers(0, 50),
    st.integers(-(2**63), 2**63),
)
def test_every_draw_is_a_token_that_the_options_leave_in(values, temperature, top_p, top_k, seed):
    token = sample(torch.tensor(values), temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    assert 0 <= token < len(values)
    if top_k > 0:
        ranked = sorted(np.float32(values), reverse=True)
        assert np.float32(values[token]) >= ranked[min(top_k, len(ranked)) - 1]


@given(st.integers(0, 2**64), st.integers(0, 2**32))
def test_logits_that_differ_in_the_last_bits_draw_the_same_token(seed, index):
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randn(200, generator=generator)
    noisy = logits + torch.randn(200, generator=generator) * 1e-7
    options = {"temperature": 1.0, "seed": seed, "index": index}
    draw, walk = uniform(seed, index), torch.softmax(logits.double(), 0).cumsum(0)
    if (walk - draw).abs().min() > 1e-6:  # not on a boundary, where a difference is unavoidable
        assert sample(logits, **options) == sample(noisy, **options)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_options_out_of_bounds_are_refused(options):
    with pytest.raises(RequestError, match="must be >= 0"):
        sample(LOGITS, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_number_are_an_error(temperature):
    with pytest.raises(RequestError, match="no finite logits"):
        sample(torch.tensor([float("nan"), 1.0]), temperature=temperature)
