"""Text: the ids transformers gives, whole characters only, and stop strings that lie across tokens."""

import json
import subprocess
import sys
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import REAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mesh.errors import ModelError, RequestError
from mesh.runtime.text import StopStrings, Text

TEMPLATE = (
    "{% for m in messages %}{% generation %}<{{ m.role }}>{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ eos_token }}{{ strftime_now('%Y') }}{% endif %}"
)
real = pytest.mark.skipif(not REAL.is_dir(), reason="run scripts/fetch_small_model.py first")


def bytewise():
    """A tokenizer whose tokens are bytes, the hardest case for a detokenizer, and one end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    bytewise().save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    return tmp_path


BYTEWISE = Text(bytewise(), None, {}, [])


@given(st.text(min_size=1), st.text(max_size=5))
def test_streamed_text_is_the_text_in_whole_characters(text, before):
    stream = BYTEWISE.stream(BYTEWISE.encode(before) if before else [])
    parts = [stream.push(token) for token in BYTEWISE.encode(text)]
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    assert "".join(parts) + stream.finish() == text


def test_half_a_character_is_never_shown():
    stream = BYTEWISE.stream([])
    tokens = BYTEWISE.encode("a\N{GRINNING FACE}")
    assert "".join(stream.push(token) for token in tokens[:-1]) == "a"
    assert stream.finish() == ""


def test_a_prompt_that_ends_inside_a_character_does_not_break_the_stream():
    stream = BYTEWISE.stream(BYTEWISE.encode("x\N{GRINNING FACE}")[:-2])
    shown = "".join(stream.push(token) for token in BYTEWISE.encode("abc"))
    assert shown.endswith("bc")


def test_chat_messages_become_the_templates_text(folder):
    text = Text.load(folder, now=lambda: datetime(2031, 1, 1))
    assert text.render([{"role": "user", "content": "hi"}]) == "<user>hi<assistant></s>2031"
    ids = text.encode([{"role": "user", "content": "hi"}])
    assert text.vocab - 1 in ids
    assert text.eos == {7, text.vocab - 1}


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "empty"),
        ([], "empty"),
        ([999], "token id 999 is unknown"),
        ([-1], "unknown"),
        ([True], "not a token id"),
        (["a"], "not a token id"),
        ([{"role": "user"}], "needs"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_prompts_that_mean_nothing_are_refused(folder, prompt, reason):
    with pytest.raises(RequestError, match=reason):
        Text.load(folder).encode(prompt)


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ messages.x.y }}", "{% if"])
def test_a_template_that_refuses_is_the_requests_mistake(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match="refuses these messages"):
        Text.load(folder).encode([{"role": "user", "content": "hi"}])


def test_a_template_cannot_leave_its_sandbox(folder):
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(RequestError, match="unsafe"):
        Text.load(folder).encode([{"role": "user", "content": "hi"}])


def test_a_model_without_a_template_takes_no_messages():
    with pytest.raises(RequestError, match="no chat template"):
        BYTEWISE.encode([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_readable_tokenizer_is_named(tmp_path, content):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Text.load(tmp_path)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_end_at_the_first_one_however_the_text_is_cut(text, stops, data):
    places = [text.find(stop) for stop in stops if stop in text]
    stopping, shown, rest, hit = StopStrings(stops), "", text, False
    while rest and not hit:
        size = data.draw(st.integers(1, len(rest)))
        safe, hit = stopping.push(rest[:size])
        shown, rest = shown + safe, rest[size:]
    if places:
        assert hit
        assert shown == text[: min(places)] or (shown.startswith(text[: min(places)]) and len(stops) > 1)
    else:
        assert not hit
        assert shown + stopping.finish() == text


def test_importing_text_brings_in_no_tensor_library():
    code = "import sys, mesh.runtime.text; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@real
def test_ids_are_those_transformers_gives():
    from transformers import AutoTokenizer

    reference, text = AutoTokenizer.from_pretrained(REAL), Text.load(REAL)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sky blue? \N{SNOWMAN}"},
    ]
    assert text.encode("Gravity is\n\n  strange") == reference("Gravity is\n\n  strange").input_ids
    wanted = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.render(messages) == wanted
    assert text.encode(messages) == reference(wanted, add_special_tokens=False).input_ids
