from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.address import join_address, split_address
from mesh.errors import ConfigError, IdentityRequired
from mesh.peer.config import default_site, is_loopback, load


def _toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "peer.toml"
    path.write_text(text)
    return path


def test_without_options_a_peer_listens_on_loopback() -> None:
    config = load({}, {})
    assert config.listen == "127.0.0.1:7700"
    assert config.site == default_site()
    assert config.region == "default"
    assert config.data_dir.parts[-2:] == ("isthmus", config.site)
    assert (config.join, config.device, config.emulate, config.http) == ((), (), {}, None)


def test_command_line_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = _toml(tmp_path, 'site = "file"\nregion = "file"\nlisten = "127.0.0.1:1"\nreserve = 0.5\n')
    config = load(
        {"site": "cli", "region": None, "join": []},
        {"MESH_SITE": "env", "MESH_REGION": "env", "MESH_HTTP": "", "PATH": "/bin"},
        path,
    )
    assert (config.site, config.region, config.listen, config.reserve) == ("cli", "env", "127.0.0.1:1", 0.5)
    assert config.transport == "auto"


def test_the_data_directory_follows_the_site() -> None:
    assert load({"site": "berlin"}, {}).data_dir.name == "berlin"


def test_lists_are_read_from_every_source(tmp_path: Path) -> None:
    wanted_join = ("127.0.0.1:7701", "[::1]:7702")
    path = _toml(
        tmp_path,
        'join = ["127.0.0.1:7701", "[::1]:7702"]\ndevice = ["cpu,threads=1,memory=200MiB", "cuda:1"]\n'
        "[emulate]\n'127.0.0.1:7701' = 80\n",
    )
    sources = [
        load({}, {}, path),
        load(
            {
                "join": list(wanted_join),
                "device": ("cpu,threads=1,memory=200MiB", "cuda:1"),
                "emulate": ["127.0.0.1:7701=80"],
            },
            {},
        ),
        load(
            {},
            {
                "MESH_JOIN": "127.0.0.1:7701, [::1]:7702",
                "MESH_DEVICE": "cpu,threads=1,memory=200MiB; cuda:1",
                "MESH_EMULATE": "127.0.0.1:7701=80",
            },
        ),
        load(
            {},
            {
                "MESH_JOIN": '["127.0.0.1:7701", "[::1]:7702"]',
                "MESH_DEVICE": '["cpu,threads=1,memory=200MiB", "cuda:1"]',
                "MESH_EMULATE": '{"127.0.0.1:7701": 80}',
            },
        ),
    ]
    for config in sources:
        assert config.join == wanted_join
        assert [spec.name for spec in config.specs] == ["cpu0", "cuda1"]
        assert config.specs[0].memory_bytes == 200 * 2**20
        assert config.emulate == {"127.0.0.1:7701": 80.0}


def test_a_variable_can_name_the_file(tmp_path: Path) -> None:
    path = _toml(tmp_path, 'site = "file"')
    assert load({}, {"MESH_CONFIG": str(path)}).site == "file"
    with pytest.raises(ConfigError, match=r"^MESH_CONFIG .*absent\.toml: No such file"):
        load({}, {"MESH_CONFIG": str(tmp_path / "absent.toml")})


@pytest.mark.parametrize(
    ("cli", "env", "toml", "said"),
    [
        ({"listen": "7700"}, {}, "", "listen='7700' from --listen: write HOST:PORT"),
        ({"listen": "127.0.0.1:70000"}, {}, "", "port '70000' is not a number from 0 to 65535"),
        ({"listen": "::1:7700"}, {}, "", "write HOST:PORT"),
        ({"join": ["127.0.0.1:0"]}, {}, "", "join=['127.0.0.1:0'] from --join: port 0 cannot be reached"),
        ({"data_dir": 5}, {}, "", "data_dir=5 from --data-dir"),
        ({"colour": "red"}, {}, "", "colour: no such option"),
        ({}, {"MESH_LISTEN": "here"}, "", "listen='here' from MESH_LISTEN"),
        ({}, {"MESH_RESERVE": "1.5"}, "", "reserve='1.5' from MESH_RESERVE: Input should be less than 1"),
        ({}, {"MESH_RESERVE": "nan"}, "", "reserve='nan' from MESH_RESERVE"),
        ({}, {"MESH_TRANSPORT": "udp"}, "", "transport='udp' from MESH_TRANSPORT: Input should be 'auto'"),
        ({}, {"MESH_LISTN": "127.0.0.1:1"}, "", "MESH_LISTN in the environment: no such key, did you mean listen?"),
        ({}, {"MESH_DEVICE": "cpu,memry=1GB"}, "", "unknown key 'memry', did you mean 'memory'?"),
        ({}, {"MESH_DEVICE": "[cpu"}, "", "it starts like JSON and is not"),
        ({}, {"MESH_EMULATE": "127.0.0.1:7701"}, "", "write HOST:PORT=MILLISECONDS"),
        ({}, {"MESH_EMULATE": "127.0.0.1:7701=-1"}, "", "-1 ms for 127.0.0.1:7701 is out of bounds"),
        ({}, {"MESH_EMULATE": "127.0.0.1:7701=fast"}, "", "emulate="),
        ({}, {"MESH_SITE": "a b"}, "", "site='a b' from MESH_SITE: write up to 63 letters"),
        ({}, {}, "lisen = 'x'", "lisen in {path}: no such key, did you mean listen?"),
        ({}, {}, "data-dir = 'x'", "data-dir in {path}: no such key, did you mean data_dir?"),
        ({}, {}, "[peer]\nsite = 'x'", "peer in {path}: no such key"),
        ({}, {}, "region = 5", "region=5 in {path}: Input should be a valid string"),
        ({}, {}, "join = [5]", "join=[5] in {path}"),
        ({}, {}, "join = 5", "join=5 in {path}"),
        ({}, {}, "emulate = 5", "emulate=5 in {path}"),
        ({}, {}, "site = ", "--config {path}: not TOML: "),
    ],
)
def test_a_refusal_names_the_key_and_where_it_came_from(
    tmp_path: Path, cli: dict[str, object], env: dict[str, str], toml: str, said: str
) -> None:
    path = _toml(tmp_path, toml)
    with pytest.raises(ConfigError) as caught:
        load(cli, env, path if toml else None)
    assert said.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; give a TOML file"):
        load({}, {}, tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load({}, {}, tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        load({}, {}, tmp_path / "binary.toml")


def test_variables_of_other_commands_are_left_alone() -> None:
    load({}, {"MESH_PEER": "127.0.0.1:1", "MESH_CA": "x", "MESHES": "y"})


@pytest.mark.parametrize("key", ["listen", "http"])
@pytest.mark.parametrize("address", ["0.0.0.0:7700", "[::]:7700", "192.168.1.5:7700", "example.org:7700"])
def test_beyond_loopback_needs_an_identity(key: str, address: str) -> None:
    with pytest.raises(IdentityRequired, match=f"{key}=.*from --{key}.*beyond loopback"):
        load({key: address}, {})
    assert getattr(load({key: address}, {}, has_identity=lambda data_dir: True), key) == address


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.9.1:7700", "[::1]:7700", "localhost:7700"])
def test_loopback_needs_none(address: str) -> None:
    assert load({"listen": address}, {}).listen == address


@pytest.mark.parametrize(
    ("hostname", "site"),
    [("Box.local", "box"), ("ÄÖ my_host", "my_host"), ("", "site"), ("---", "site"), ("x" * 90, "x" * 63)],
)
def test_the_default_site_is_a_valid_name(hostname: str, site: str) -> None:
    assert default_site(hostname) == site
    assert load({"site": default_site(hostname)}, {}).site == site


@given(st.text(max_size=80))
def test_any_hostname_makes_a_valid_site(hostname: str) -> None:
    load({"site": default_site(hostname)}, {})


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert split_address(join_address(host, port)) == (host, port)
    is_loopback(host)
