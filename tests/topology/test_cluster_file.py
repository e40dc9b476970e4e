"""The formats of a cluster and of a model's shape: what they give, and errors that name the place."""

import copy
import json
import math
from typing import Any

import pytest

from topology.cluster import ClusterFile, read_cluster
from topology.document import FormatError
from topology.shape_file import LONGEST, read_model


def device(name: str = "gpu0", **other: Any) -> dict[str, Any]:
    return {
        "name": name,
        "vendor": "nvidia",
        "kind": "cuda",
        "memory_bytes": 8e10,
        "flops": {"bfloat16": 3e14},
        "memory_bandwidth_bytes_per_s": 2e12,
        "price_per_hour": 2,
        **other,
    }


CLUSTER = {
    "sites": [
        {
            "name": "fra",
            "region": "eu-central",
            "devices": [device(), device("gpu1", free_bytes=10**10, load=0.5, reserve=0.1)],
            "local_link": {"rtt_ms": 0.5, "bandwidth_bytes_per_s": 1e9},
        },
        {"name": "nyc", "devices": [device()], "trusted": False},
        {"name": "syd", "devices": [device()]},
    ],
    "links": [
        {"from": "fra", "to": "nyc", "rtt_ms": 88, "bandwidth_bytes_per_s": 1e8, "loss": 0.01},
        {"from": "nyc", "to": "syd", "rtt_ms": 200, "bandwidth_bytes_per_s": 1e7},
        {"from": "syd", "to": "nyc", "rtt_ms": 220, "bandwidth_bytes_per_s": 2e7},
    ],
}
MODEL = {
    "layers": 32,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "intermediate": 14336,
    "vocab": 128256,
    "tied_embeddings": False,
    "bytes_per_parameter": 2,
}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "torch_dtype": "float16",
    "max_position_embeddings": 77,
    "tie_word_embeddings": True,
}


def changed(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(document)
    here: Any = result
    for part in place[:-1]:
        here = here[part]
    here[place[-1]] = value
    return result


def test_a_cluster_file_gives_its_sites_devices_and_links() -> None:
    snapshot, _ = read_cluster(CLUSTER)
    fra, nyc, _ = snapshot.sites
    assert (fra.region, fra.local_rtt_s, fra.local_bandwidth, fra.trusted) == ("eu-central", 0.0005, 1e9, True)
    assert not nyc.trusted
    first, second = fra.devices
    assert (first.memory_bytes, first.free_bytes, first.reserve, first.price_per_hour) == (8 * 10**10, 8 * 10**10, 0, 2)
    assert (second.free_bytes, second.load, second.reserve) == (10**10, 0.5, 0.1)


def test_a_link_counts_for_both_directions_unless_the_other_is_listed() -> None:
    snapshot, _ = read_cluster(CLUSTER)
    links = {(link.source, link.target): link for link in snapshot.links}
    assert links["fra", "nyc"].rtt_s == links["nyc", "fra"].rtt_s == 0.088
    assert links["nyc", "fra"].loss == 0.01
    assert (links["nyc", "syd"].rtt_s, links["syd", "nyc"].rtt_s) == (0.2, 0.22)
    assert (links["nyc", "syd"].bandwidth, links["syd", "nyc"].bandwidth) == (1e7, 2e7)


def test_a_pair_without_a_link_is_unreachable_and_said_so() -> None:
    snapshot, notes = read_cluster(CLUSTER)
    links = {(link.source, link.target): link for link in snapshot.links}
    assert not links["fra", "syd"].reachable and not links["syd", "fra"].reachable
    assert notes == ("no link is given for 1 of 3 pairs of sites (fra - syd): they count as unreachable",)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("sites", 1, "devices", 0, "memory_bytes"), -1, "sites[1].devices[0].memory_bytes: should be"),
        (("sites", 1, "devices", 0, "memory_bytes"), "80G", "sites[1].devices[0].memory_bytes: "),
        (("sites", 1, "devices", 0, "memory_bytes"), math.nan, "sites[1].devices[0].memory_bytes: "),
        (("sites", 1, "devices", 0, "memory_bytes"), 1.5, "sites[1].devices[0].memory_bytes: "),
        (("sites", 1, "devices", 0, "memory_bytes"), True, "sites[1].devices[0].memory_bytes: "),
        (("sites", 1, "devices", 0, "memory_bytes"), 1e30, "sites[1].devices[0].memory_bytes: "),
        (("sites", 1, "devices", 0, "memory_byte"), 1, "memory_byte: unknown key: did you mean 'memory_bytes'?"),
        (
            ("sites", 1, "devices", 0, "flops", "bfloat16"),
            math.inf,
            "sites[1].devices[0].flops.bfloat16: must be a fin",
        ),
        (("sites", 1, "devices", 0, "flops"), {}, "sites[1].devices[0].flops: must not be empty"),
        (("sites", 0, "devices", 1, "name"), "gpu0", "sites[0].devices[1].name: 'gpu0' is the name of devices[0]"),
        (("sites", 0, "devices", 0, "load"), 1, "sites[0].devices[0].load: "),
        (("sites", 0, "devices"), [], "sites[0].devices: must not be empty"),
        (("sites", 0), 3, "sites[0]: must be an object, not 3"),
        (("sites", 1, "name"), "fra", "sites[1].name: 'fra' is the name of sites[0] already"),
        (("sites", 1, "name"), "a/b", "sites[1].name: must not contain slashes"),
        (("sites", 1, "name"), "", "sites[1].name: must not be empty"),
        (("sites",), {}, "sites: should be a valid list"),
        (("site",), [], "site: unknown key: did you mean 'sites'?"),
        (("sites", 0, "local_link"), {"rtt": 1}, "sites[0].local_link.rtt: unknown key: did you mean 'rtt_ms'?"),
        (("links", 0, "rtt"), 3, "links[0].rtt: unknown key: did you mean 'rtt_ms'?"),
        (("links", 0, "rtt_ms"), -2, "links[0].rtt_ms: "),
        (("links", 0, "loss"), 1, "links[0].loss: "),
        (("links", 0, "bandwidth_bytes_per_s"), 0, "links[0].bandwidth_bytes_per_s: should be greater than 0"),
        (("links", 0, "to"), "nycc", "links[0].to: no site is named 'nycc': did you mean 'nyc'?"),
        (("links", 0, "to"), "fra", "links[0]: joins 'fra' to itself"),
        (("links", 1, "from"), "fra", "links[1]"),
        (("links", 2), CLUSTER["links"][1], "links[2]: nyc -> syd is links[1] already"),
    ],
)
def test_a_mistake_in_a_cluster_file_is_one_line_that_names_the_place(
    place: tuple[Any, ...], value: Any, says: str
) -> None:
    document = changed(CLUSTER, place, value)
    if place == ("links", 1, "from"):
        document["links"][1]["to"] = "nyc"
    with pytest.raises(FormatError) as refusal:
        read_cluster(document)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("document", [None, 3, [], "x", {}])
def test_what_is_no_cluster_at_all_is_refused(document: Any) -> None:
    with pytest.raises(FormatError):
        read_cluster(document)


def test_the_schema_names_every_key_as_the_file_does() -> None:
    schema = json.dumps(ClusterFile.model_json_schema())
    for key in ("from", "to", "rtt_ms", "memory_bandwidth_bytes_per_s", "local_link", "price_per_hour"):
        assert f'"{key}"' in schema


@pytest.mark.parametrize(
    ("stored", "dtype", "element"), [(4, "float32", 4), (2, "bfloat16", 2), (1, "bfloat16", 2), (0.5, "bfloat16", 2)]
)
def test_bytes_per_parameter_are_the_weights_and_activations_have_two_at_least(
    stored: float, dtype: str, element: int
) -> None:
    spec = read_model({**MODEL, "bytes_per_parameter": stored}, "m")
    assert (spec.name, spec.dtype, spec.element_bytes, spec.weight_bytes) == ("m", dtype, element, stored)
    assert spec.layer_bytes == spec.layer_parameters * stored
    assert spec.context == LONGEST


def test_a_shape_may_leave_out_what_follows_from_the_rest() -> None:
    short = {key: value for key, value in MODEL.items() if key not in ("kv_heads", "head_dim", "tied_embeddings")}
    spec = read_model(short, "m")
    assert (spec.kv_heads, spec.head_dim, spec.tied_embeddings) == (32, 128, False)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("kv_heads", 5, "kv_heads: 32 heads do not divide into 5 KV heads"),
        ("bytes_per_parameter", 3, "bytes_per_parameter: must be 0.5, 1, 2 or 4"),
        ("bytes_per_parameter", math.nan, "bytes_per_parameter: must be a finite number"),
        ("layer", 3, "layer: unknown key: did you mean 'layers'?"),
        ("layers", 0, "layers: "),
        ("layers", "12", "layers: "),
        ("vocab", 10**12, "vocab: "),
        ("tied_embeddings", 1, "tied_embeddings: "),
        ("dtype", "int3", "dtype: "),
    ],
)
def test_a_mistake_in_a_shape_names_the_place(key: str, value: Any, says: str) -> None:
    with pytest.raises(FormatError) as refusal:
        read_model({**MODEL, key: value}, "m")
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_hugging_face_configuration_is_a_shape_too() -> None:
    spec = read_model(CONFIG, "tiny")
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (2, 4, 2, 16)
    assert (spec.dtype, spec.weight_bytes, spec.context, spec.tied_embeddings) == ("float16", 2, 77, True)
    plain = {key: value for key, value in CONFIG.items() if key not in ("tie_word_embeddings", "torch_dtype")}
    assert not read_model(plain, "m").tied_embeddings
    assert read_model({**plain, "model_type": "gemma2"}, "m").tied_embeddings
    assert read_model({"model_type": "x", "text_config": CONFIG}, "m") == read_model(CONFIG, "m")


@pytest.mark.parametrize(
    ("found", "stored"),
    [
        ({"quant_method": "gptq", "bits": 4}, 0.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1),
        ({"quant_method": "fp8"}, 1),
    ],
)
def test_quantised_weights_of_a_configuration_count_by_their_bits(found: dict[str, Any], stored: float) -> None:
    assert read_model({**CONFIG, "quantization_config": found}, "m").weight_bytes == stored


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_key_value_heads", 3, "num_key_value_heads: 4 heads do not divide into 3"),
        ("hidden_size", None, "hidden_size: is missing"),
        ("hidden_size", "big", "hidden_size: "),
        ("num_local_experts", 8, "num_local_experts: a mixture of experts"),
        ("torch_dtype", "int3", "torch_dtype: 'int3'"),
        ("is_encoder_decoder", True, "is_encoder_decoder: "),
        ("quantization_config", {"quant_method": "odd"}, "quantization_config: "),
    ],
)
def test_a_configuration_that_cannot_be_planned_for_is_refused(key: str, value: Any, says: str) -> None:
    with pytest.raises(FormatError) as refusal:
        read_model({**CONFIG, key: value}, "m")
    assert says in str(refusal.value)
