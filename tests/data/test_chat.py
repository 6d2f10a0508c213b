"""Conversations: each template is handed what it writes; what it cannot write is refused."""

import re

import pytest

from prunekit.data.chat import ChatTemplate
from prunekit.errors import ConfigError
from tests.support.checkpoints import templated

TEXTS = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
TRIMMED = "{% for m in messages %}<{{ m['content'] | trim }}>{% endfor %}"
ADDED = "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}"
PARTS = "{% for m in messages %}<{% for p in m.content %}{{ p.text }}{% endfor %}>{% endfor %}"
BOTH = (
    "{% for m in messages %}<{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}>{% endfor %}"
)
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEXTS
NOTHING = "{{ messages | length }}"


def part(text):
    return {"type": "text", "text": text}


def said(*contents, **more):
    return {"messages": [{"role": "user", "content": each, **more} for each in contents]}


def text(template, row):
    return ChatTemplate(templated(template)).text(row, "a:1")


def refuse(template, row, message):
    with pytest.raises(ConfigError, match=rf"^a:1: {re.escape(message)}"):
        text(template, row)


@pytest.mark.parametrize("template", [TEXTS, TRIMMED, ADDED, PARTS, BOTH])
def test_every_template_writes_texts_and_parts(template):
    assert text(template, said("hello there", [part("a b")])) == "<hello there><a b>"


@pytest.mark.parametrize(
    ("template", "joined"), [(TEXTS, "a\nb"), (ADDED, "a\nb"), (PARTS, "ab"), (BOTH, "ab")]
)
def test_several_parts_are_joined_as_the_template_does_or_by_lines(template, joined):
    assert text(template, said([part("a"), part("b")])) == f"<{joined}>"


def test_entries_that_a_table_left_empty_are_not_there():
    template = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}" + TEXTS
    row = said([{"type": "text", "text": "a", "image": None}], tool_calls=None, name=None)
    assert text(template, row) == "['role', 'content']<a>"


def test_a_call_without_content_is_an_empty_one():
    row = said(None, tool_calls=[{"function": {"name": "f"}}])
    assert text("{{ messages[0].tool_calls[0].function.name }}" + TEXTS, row) == "f<>"


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "thinking", None])
def test_parts_that_are_no_text_are_refused(kind):
    refuse(BOTH, said([part("a"), {"type": kind, "text": "b"}]), "a content has a part of type")


@pytest.mark.parametrize("content", [None, 3, {}, [], ["a"], [None], [{"type": "text"}]])
def test_contents_that_are_neither_text_nor_parts_are_refused(content):
    with pytest.raises(ConfigError, match=r"^a:1: (a content has a part|.*content a text or a l)"):
        text(BOTH, said(content))


@pytest.mark.parametrize("messages", [None, [], {}, "a", [1], [{"content": "a"}], [{"role": 1}]])
def test_what_is_no_conversation_is_refused(messages):
    refuse(TEXTS, {"messages": messages}, '"messages" must be a list of {"role"')


def test_a_template_that_writes_no_user_gets_texts_alone():
    assert text(NOTHING, said("a", "b")) == "2"
    refuse(NOTHING, said([part("a")]), "a content is a list of parts, and this model")


CALLABLE = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


@pytest.mark.parametrize("tools", [[CALLABLE], str([CALLABLE]).replace("'", '"')])
def test_tools_are_handed_on(tools):
    found = text(TOOLS, said("a") | {"tools": tools})
    assert found.startswith('[{"type": "function"')
    assert found.endswith("<a>")


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools):
    assert text(TEXTS, said("a") | {"tools": tools}) == "<a>"


def test_the_template_for_tools_is_chosen_by_name():
    both = {"default": TEXTS, "tool_use": TOOLS}
    assert text(both, said("a")) == "<a>"
    assert '"name": "f"' in text(both, said("a") | {"tools": [CALLABLE]})


def test_tools_that_a_template_drops_are_refused():
    refuse(TEXTS, said("a") | {"tools": [CALLABLE]}, 'has "tools", which this model\'s chat')


@pytest.mark.parametrize("tools", ["{", "[" * 100_000, 3, {"a": 1}, ["f"], "3"])
def test_tools_that_are_no_list_are_refused(tools):
    with pytest.raises(ConfigError, match=r'^a:1: "tools" (must be a list|is text that is not)'):
        text(TOOLS, said("a") | {"tools": tools})


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages.x.y }}", "{% if %}", "{{ 1 / 0 }}"]
)
def test_what_a_template_rejects_is_refused(template):
    refuse(template, said("a"), "the chat template rejects this row: ")


def test_a_template_without_words_for_its_error_is_named_by_kind():
    with pytest.raises(ConfigError, match=r"rejects this row: MemoryError$"):
        ChatTemplate(templated("{{ 'x' * 10 ** 14 }}")).text(
            {"messages": [{"role": "user", "content": "a"}]}, "f:1"
        )
