"""Lossy codes keep what they promise: small errors, outliers spared, and nothing read that was not written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.runtime.codes import NAMES, CodeError, decode, encode, measure
from mesh.runtime.protocol import ProtocolError


def error(states, code):
    back = decode(encode(states, code), *states.shape, torch.float32)
    return float((back - states).norm() / states.norm())


@pytest.mark.parametrize(("code", "limit"), [("bfloat16", 0.003), ("int8", 0.008), ("fp8", 0.03)])
def test_the_relative_error_on_gaussian_states_is_that_of_the_code(code, limit):
    states = torch.randn(16, 576, generator=torch.Generator().manual_seed(1))
    assert 0 < error(states, code) < limit


@pytest.mark.parametrize("code", sorted(NAMES))
def test_the_error_that_is_told_is_the_one_that_was_made(code):
    states = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    told = measure(states, encode(states, code))
    assert told.rms == pytest.approx(error(states, code), rel=1e-5)
    assert told.rms < told.worst < 30 * told.rms
    assert measure(torch.zeros(2, 8), encode(torch.zeros(2, 8), code)) == CodeError()
    assert measure(states * float("nan"), encode(states, code)).rms == 1e9


def test_outlier_channels_do_not_spoil_the_others():
    states = torch.randn(16, 576, generator=torch.Generator().manual_seed(2))
    states[:, :8] *= 60
    back = decode(encode(states, "int8"), 16, 576, torch.float32)
    normal = states[:, 8:]
    assert float((back[:, 8:] - normal).norm() / normal.norm()) < 0.03


@pytest.mark.parametrize("code", sorted(NAMES))
def test_one_row_of_any_width_and_zeros_survive(code):
    for width in (1, 127, 128, 129):
        states = torch.zeros(1, width)
        assert torch.equal(decode(encode(states, code), 1, width, torch.float32), states)


@pytest.mark.parametrize("code", sorted(NAMES))
def test_fewer_bytes_than_float32_travel(code):
    assert encode(torch.randn(4, 576), code).numel() < 4 * 576 * 2.1


@settings(max_examples=50)
@given(st.binary(max_size=400))
def test_bytes_that_no_encoder_wrote_are_refused_or_read_as_numbers(data):
    try:
        states = decode(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8), 2, 16, torch.float32)
    except ProtocolError:
        return
    assert states.shape == (2, 16)
