"""What a request may say, and how a mistake in it is told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.client.options import generate_request
from mesh.errors import RequestError


def test_defaults_are_greedy_and_drawless():
    request = generate_request("j", "hello", {})
    assert (request.text, request.max_tokens, request.temperature, request.top_p) == ("hello", 128, 0.0, 1.0)
    assert (request.top_k, request.seed, list(request.stop), request.ignore_eos) == (0, 0, [], False)


def test_sampling_without_a_seed_draws_one_and_a_given_seed_is_kept():
    drawn = {generate_request("j", "x", {"temperature": 0.7}).seed for _ in range(4)}
    assert len(drawn) > 1
    assert generate_request("j", "x", {"temperature": 0.7, "seed": 2**64 - 1}).seed == 2**64 - 1


def test_chat_messages_and_token_ids_are_told_apart():
    chat = generate_request("j", [{"role": "user", "content": "hi"}], {})
    assert chat.WhichOneof("prompt") == "chat" and chat.chat.messages[0].content == "hi"
    tokens = generate_request("j", np.array([1, 2, 3]), {})
    assert tokens.WhichOneof("prompt") == "tokens" and list(tokens.tokens.ids) == [1, 2, 3]


def test_one_stop_text_or_several():
    assert list(generate_request("j", "x", {"stop": "\n"}).stop) == ["\n"]
    assert list(generate_request("j", "x", {"stop": ["a", "b"]}).stop) == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        (b"bytes", {}, "not a bytes"),
        ({"role": "user"}, {}, "not a dict"),
        (7, {}, "not a int"),
        ("\ud800", {}, "not valid Unicode"),
        ([{"role": "user"}], {}, "message 0 of the prompt needs a text as 'content'"),
        ([{"role": "user", "contents": "x"}], {}, "did you mean 'content'"),
        ([{"role": "user", "content": "x"}, "y"], {}, "message 1 of the prompt must be a mapping"),
        ([1, -2], {}, "token 1 of the prompt"),
        ([1, True], {}, "token 1 of the prompt"),
        ([1, 2.5], {}, "token 1 of the prompt"),
        ("x", {"max_token": 3}, "unknown option 'max_token'; did you mean 'max_tokens'?"),
        ("x", {"zzz": 3}, "known are max_tokens"),
        ("x", {"max_tokens": 0}, "max_tokens must lie between 1"),
        ("x", {"max_tokens": 1.5}, "whole number"),
        ("x", {"max_tokens": None}, "whole number"),
        ("x", {"temperature": -1}, "temperature must lie"),
        ("x", {"temperature": float("nan")}, "temperature must be a number"),
        ("x", {"temperature": "hot"}, "temperature must be a number"),
        ("x", {"top_p": 0}, "top_p must lie"),
        ("x", {"top_k": -1}, "top_k must lie"),
        ("x", {"seed": -1}, "seed must be"),
        ("x", {"seed": 2**64}, "seed must be"),
        ("x", {"stop": ""}, "stop must be"),
        ("x", {"stop": ["a", 3]}, "stop must be"),
        ("x", {"ignore_eos": 1}, "ignore_eos must be"),
    ],
)
def test_a_mistake_is_named(prompt, options, says):
    with pytest.raises(RequestError, match=r"^[^\n]+$") as caught:
        generate_request("j", prompt, options)
    assert says in str(caught.value)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_keys = st.sampled_from(["max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos"]) | st.text()


@given(_json, st.dictionaries(_keys, _json, max_size=3))
def test_anything_at_all_is_a_request_or_a_request_error(prompt, options):
    try:
        generate_request("j", prompt, options).SerializeToString()
    except RequestError as error:
        assert "\n" not in str(error)
