from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.devices.units import UNITS, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("200MiB", 200 * 2**20),
        ("200 mib", 200 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("3KB", 3000),
        ("3KiB", 3072),
        ("2TiB", 2 * 2**40),
    ],
)
def test_sizes_are_read_in_si_and_iec_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "200", "MiB", "-1MiB", "1e3MiB", "0B", "0.1B", "9999999TiB", "1 2MiB", "5MiX", "٣MiB?"]
)
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_bytes(text)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 2**50), st.sampled_from(["B", "KiB", "MiB"]))
def test_whole_numbers_of_a_unit_are_exact(number: int, unit: str) -> None:
    size = number * UNITS[unit]
    if size <= 2**50:
        assert parse_bytes(f"{number}{unit}") == size


def test_formatting_uses_the_largest_unit() -> None:
    assert [format_bytes(size) for size in (1, 1024, 209715200, 3 * 2**29)] == ["1B", "1KiB", "200MiB", "1.5GiB"]
