"""A peer's configuration: command line over `MESH_*` variables over a TOML file over defaults.

Every value is checked before anything starts, and a refusal says in one line which key, where its value came from, what
is wrong and what to write instead. Lists in a variable are separated by blanks or `;` (a device spec holds commas).
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import platform
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from mesh.address import DEFAULT_ADDRESS, join_address, split_address
from mesh.devices.spec import DeviceSpec, parse_specs
from mesh.devices.units import parse_bytes
from mesh.errors import ConfigError, IdentityRequired

ENV_PREFIX = "MESH_"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})|[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: A minute of round trip is past any network; it bounds what a slip of the keyboard can do to a drill.
_LARGEST_RTT_MS = 60_000.0
#: How near an unknown `MESH_*` variable must be to a key to be taken for a slip: other commands have variables too.
_SLIP = 0.75


def is_loopback(host: str) -> bool:
    """True where only this machine can reach a listener on `host`. A name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def default_site(hostname: str | None = None) -> str:
    """A site name made of the machine's name: its first label, with what a name cannot hold replaced."""
    label = (platform.node() if hostname is None else hostname).partition(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", label).strip("-_").lower()[:63]
    return name or "site"


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("write up to 63 letters, digits, '.', '_' or '-', a letter or digit first")
    return value


def _split(value: str) -> tuple[str, int]:
    host, port = split_address(value.strip())
    if not _HOST.fullmatch(host):
        raise ValueError(f"write HOST:PORT, such as {DEFAULT_ADDRESS} or [::1]:7700")
    return host, port


def _bind(value: str) -> str:
    return join_address(*_split(value))


def _target(value: str) -> str:
    host, port = _split(value)
    if port == 0:
        raise ValueError("port 0 cannot be reached; write the port the peer listens on")
    return join_address(host, port)


def _words(value: object) -> object:
    """A list from a variable: JSON, or words between blanks and semicolons."""
    if not isinstance(value, str):
        return value
    return _json(value) if value.lstrip().startswith("[") else re.split(r"[;\s]+", value.strip(" ;\t\n"))


def _addresses(value: object) -> object:
    return _words(value.replace(",", " ") if isinstance(value, str) and not value.lstrip().startswith("[") else value)


def _delays(value: object) -> object:
    """A table from `HOST:PORT=MS` words, or as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return _json(value)
    words = _addresses(value) if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return words
    pairs = [str(word).rpartition("=") for word in words]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("write HOST:PORT=MILLISECONDS, such as 127.0.0.1:7701=80")
    return {address: delay for address, _, delay in pairs}


def _json(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("it starts like JSON and is not; write plain words instead") from None


def _checked_delays(value: dict[str, float]) -> dict[str, float]:
    for address, delay_ms in value.items():
        if not 0 <= delay_ms <= _LARGEST_RTT_MS:
            raise ValueError(f"{delay_ms:g} ms for {address} is out of bounds; write 0 to {_LARGEST_RTT_MS:g}")
    return {_target(address): delay_ms for address, delay_ms in value.items()}


def _checked_devices(value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(str(spec) for spec in parse_specs(value))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _expanded(value: Path) -> Path:
    return value.expanduser().absolute()


def _expanded_or_none(value: Path | None) -> Path | None:
    return None if value is None else _expanded(value)


def _size(value: str) -> str:
    if value:
        parse_bytes(value)
    return value


def _default_data_dir(values: dict[str, Any]) -> Path:
    return platformdirs.user_data_path("isthmus", appauthor=False) / str(values.get("site", "site"))


Name = Annotated[str, AfterValidator(_name)]
Bind = Annotated[str, AfterValidator(_bind)]
Target = Annotated[str, AfterValidator(_target)]


class PeerConfig(BaseSettings):
    """What a peer is told. Use `load`, which merges the sources; the constructor takes checked-for values alone.

    `advertise` is where others reach `listen`, where that differs: behind a forwarded port, or when listening on all of
    a machine's addresses (then by default the one that its own way out has). `emulate` holds round-trip times in
    milliseconds that are added between this peer and others, by their address; those in `cut` it does not reach at all.
    `relay_mbps` is what it may hand on for others that do not reach each other; with 0 it does not.
    `models` is the folder below which this site's own models lie; without it they may lie anywhere. `withhold` are
    patterns of models (names or paths) whose weights this site does not give to others; `weights_cache` is how much
    disk the weights that came from others may take, by default half of what is free; `weights_rate` bounds the bytes
    a second of weights that this site gives to others.
    `reserve` is the share of each device's memory kept for the loss of another site. `probes`: whether the bandwidth of
    this site's links may be measured by short bursts. `seal` off leaves frames between this site's own shards open.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=True)

    site: Name = Field(default_factory=default_site)
    listen: Bind = DEFAULT_ADDRESS
    advertise: Target | None = None
    join: Annotated[tuple[Target, ...], NoDecode, BeforeValidator(_addresses)] = ()
    http: Bind | None = None
    data_dir: Annotated[Path, AfterValidator(_expanded)] = Field(default_factory=_default_data_dir)
    region: Name = "default"
    device: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words), AfterValidator(_checked_devices)] = ()
    cut: Annotated[tuple[Target, ...], NoDecode, BeforeValidator(_addresses)] = ()
    emulate: Annotated[dict[str, float], NoDecode, BeforeValidator(_delays), AfterValidator(_checked_delays)] = {}
    transport: Literal["auto", "tcp", "ucx"] = "auto"
    probes: bool = True
    relay_mbps: float = Field(default=1000.0, ge=0.0, le=1e6)
    seal: Literal["on", "off"] = "on"
    models: Annotated[Path | None, AfterValidator(_expanded_or_none)] = None
    withhold: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ()
    weights_cache: Annotated[str, AfterValidator(_size)] = ""
    weights_rate: Annotated[str, AfterValidator(_size)] = ""
    reserve: float = Field(default=0.2, ge=0.0, lt=1.0)

    @property
    def weights_cache_bytes(self) -> int:
        """The limit of the cache of weights; 0 for the default."""
        return parse_bytes(self.weights_cache) if self.weights_cache else 0

    @property
    def weights_rate_bytes_per_s(self) -> int:
        """The most weights given away a second; 0 for no limit."""
        return parse_bytes(self.weights_rate) if self.weights_rate else 0

    @property
    def specs(self) -> tuple[DeviceSpec, ...]:
        """The `--device` options, each with its name; empty where discovery decides."""
        return parse_specs(self.device)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the constructor is given: `load` merges the sources itself, to know where each value came from."""
        return (init_settings,)


KEYS = tuple(PeerConfig.model_fields)


class _Environment(EnvSettingsSource):
    """pydantic's reading of variables, over a mapping that is handed in."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        super().__init__(PeerConfig)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {key.lower(): value for key, value in self._environ.items() if value}


def load(
    cli: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    toml_path: Path | None = None,
    *,
    has_identity: Callable[[Path], bool] = lambda data_dir: False,
) -> PeerConfig:
    """Merge the sources and check them. In `cli`, None and empty lists mean: not given. `env` is os.environ by default.

    Without `toml_path` the variable MESH_CONFIG may name the file. `has_identity` tells whether a data directory holds
    a site's identity. Raises ConfigError, and IdentityRequired where the peer would listen beyond loopback without one.
    """
    env = os.environ if env is None else env
    told_by = "--config"
    if toml_path is None and env.get("MESH_CONFIG"):
        toml_path, told_by = Path(env["MESH_CONFIG"]), "MESH_CONFIG"
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    if toml_path is not None:
        for key, value in _read_toml(toml_path, told_by).items():
            values[key], origins[key] = value, f"in {toml_path}"
    _refuse_slips(env)
    for key, value in _Environment(env)().items():
        values[key], origins[key] = value, f"from {ENV_PREFIX}{key.upper()}"
    for key, value in (cli or {}).items():
        if key not in KEYS:
            raise ConfigError(f"{key}: no such option{_nearest(key)}")
        if value is not None and value not in ([], (), {}):
            values[key], origins[key] = value, f"from --{key.replace('_', '-')}"
    try:
        config = PeerConfig(**values)
    except ValidationError as error:
        raise ConfigError(_explained(error, values, origins)) from None
    for key in ("listen", "http"):
        address = getattr(config, key)
        if address and not is_loopback(split_address(address)[0]) and not has_identity(config.data_dir):
            raise IdentityRequired(
                f"{key}={address} ({origins[key]}) is beyond loopback and this site has no identity; "
                f"listen on 127.0.0.1, or give the site an identity first"
            )
    return config


def _read_toml(path: Path, told_by: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{told_by} {path}: {error.strerror or error}; give a TOML file that can be read") from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are both
        raise ConfigError(f"{told_by} {path}: not TOML: {error}") from None
    for key in document:
        if key not in KEYS:
            raise ConfigError(f"{key} in {path}: no such key{_nearest(key)}")
    return document


def _refuse_slips(env: Mapping[str, str]) -> None:
    """Refuse a variable that looks like a misspelt key. One that looks like none may belong to something else."""
    for variable in sorted(env):
        key = variable.removeprefix(ENV_PREFIX).lower()
        if key != variable.lower() and key not in KEYS and difflib.get_close_matches(key, KEYS, n=1, cutoff=_SLIP):
            raise ConfigError(f"{variable} in the environment: no such key{_nearest(key)}")


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), KEYS, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else f"; known are {', '.join(KEYS)}"


def _explained(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """One line for the first thing pydantic refused."""
    details = error.errors(include_url=False, include_context=False)
    first = next((detail for detail in details if str(detail["loc"][0]) in values), details[0])
    key = str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}={_short(values.get(key))} {origins.get(key, 'by default')}: {message}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
