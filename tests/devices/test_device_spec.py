from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.devices.spec import DeviceSpec, parse_spec, parse_specs
from mesh.errors import ConfigError


def test_a_spec_narrows_a_device() -> None:
    assert parse_spec("cpu, threads=1, memory=200MiB") == DeviceSpec("cpu", threads=1, memory_bytes=200 * 2**20)
    assert parse_spec("cuda:1,name=big") == DeviceSpec("cuda", 1, name="big")
    assert parse_spec("xpu") == DeviceSpec("xpu", 0)


def test_a_drill_states_speed() -> None:
    spec = parse_spec("cpu,flops=50e9,bandwidth=10GB/s")
    assert (spec.flops, spec.bandwidth) == (50e9, 10e9)
    assert parse_spec("cpu,bandwidth=1e10").bandwidth == 1e10


def test_cpus_are_numbered_in_order_around_names_that_are_taken() -> None:
    names = [spec.name for spec in parse_specs(["cpu", "cpu,name=cpu1", "cpu", "cuda:3"])]
    assert names == ["cpu0", "cpu1", "cpu2", "cuda3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu", "unknown kind 'gpu', did you mean"),
        ("", "unknown kind ''"),
        ("toaster", "unknown kind 'toaster'; known are cuda"),
        ("cpu,memry=1GB", "unknown key 'memry', did you mean 'memory'?"),
        ("cpu,colour=red", "unknown key 'colour'"),
        ("cpu,memory=200", "memory: '200' is not a size"),
        ("cpu,threads=0", "threads: '0' is not a number of threads"),
        ("cpu,threads=two", "threads: 'two'"),
        ("cpu,threads", "key 'threads' has no value"),
        ("cpu,threads=1,threads=2", "key 'threads' is given twice"),
        ("cpu,name=A B", "name: 'A B' is not a name"),
        ("cpu,flops=fast", "flops: 'fast' is not a number"),
        ("cpu,flops=nan", "flops: 'nan' is out of bounds"),
        ("cpu,bandwidth=wide", "bandwidth: 'wide' is not a bandwidth"),
        ("cpu:1", "cpu takes no index"),
        ("cuda:x", "index 'x' is not a number"),
        ("cuda:", "index '' is not a number"),
    ],
)
def test_a_refusal_names_the_key_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("texts", [["cuda:0", "cuda"], ["cpu,name=a", "cpu,name=a"], ["cuda:0", "cpu,name=cuda0"]])
def test_two_devices_never_have_one_name(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="two devices are named"):
        parse_specs(texts)


@given(
    st.builds(
        DeviceSpec,
        kind=st.sampled_from(["cpu", "mps"]),
        name=st.none() | st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,31}\Z"),
        threads=st.none() | st.integers(1, 1024),
        memory_bytes=st.none() | st.integers(1, 2**50),
        flops=st.none() | st.floats(1e3, 1e18),
        bandwidth=st.none() | st.floats(1e3, 1e18),
    )
)
def test_a_spec_survives_being_written_and_read(spec: DeviceSpec) -> None:
    assert parse_spec(str(spec)) == spec


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_spec(text)
    except ConfigError:
        pass
