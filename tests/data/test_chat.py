"""Chat messages as people write them, and as templates take or refuse them."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_rl.data.chat import read_prompt, read_response, render
from megatron_rl.data.intake import BrokenRecord
from megatron_rl.models.scratch import character_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content | trim }}]{% endfor %}"
)
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content.replace('/think', '') }}"
    "{% elif m.role == 'assistant' %}A {{ m.content.split('</think>')[-1] }}{% endif %};{% endfor %}"
)


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def rendered(messages: Any, template: str = CHATML) -> str:
    tokenizer = character_tokenizer(1024)
    tokenizer.chat_template = template
    return render(read_prompt(messages), tokenizer)


def reason(function: Any, *arguments: Any) -> str:
    with pytest.raises(BrokenRecord) as caught:
        function(*arguments)
    return caught.value.reason


def test_parts_of_text_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "Look:", "image_url": None}, {"type": "text", "text": "1+1?"}]
    assert read_prompt([say("user", parts)]) == [say("user", "Look:\n1+1?")]
    assert read_prompt([say("user", ["Look:", "1+1?"])]) == [say("user", "Look:\n1+1?")]
    image = {"type": "image_url", "image_url": {"url": "u"}}
    assert "image_url" in reason(read_prompt, [say("user", [*parts, image])])
    for content in (
        [{"text": "a"}],
        [{"type": "text"}],
        [{"type": "text", "text": None}],
        [None],
        [],
        {"a": 1},
        5,
        0.5,
    ):
        assert "content" in reason(read_prompt, [say("user", content)])


def test_null_content_is_refused_except_beside_tool_calls() -> None:
    assert reason(read_prompt, [say("user", None)]) == "a chat message with null content"
    assert reason(read_prompt, [say("user", None, tool_calls=[{"a": 1}])]) == "a chat message with null content"
    assert reason(read_prompt, [say("user", "a"), say("assistant", None)]) == "a chat message with null content"
    call = {"function": {"name": "add", "arguments": None}, "id": None}
    messages = read_prompt([say("user", "a"), say("assistant", None, tool_calls=[call]), say("tool", "2")])
    assert messages[1] == say("assistant", "", tool_calls=[{"function": {"name": "add"}}])


def test_empty_fields_that_a_table_gives_every_message_are_not_there() -> None:
    assert read_prompt([say("user", "a", name=None, tool_calls=None)]) == [say("user", "a")]


@pytest.mark.parametrize(
    "messages",
    [
        (say("system", "add"), say("user", "1+1?")),
        np.array([say("system", "add"), say("user", "1+1?")], dtype=object),
        [say(np.str_("system"), b"add"), say("user", np.array(["1+1?"], dtype=object))],
        json.dumps([say("system", "add"), say("user", "1+1?")]),
        "\n " + json.dumps([say("system", "add"), say("user", [{"type": "text", "text": "1+1?"}])], indent=1),
    ],
)
def test_messages_of_other_libraries_and_as_json_text_are_messages(messages: Any) -> None:
    assert read_prompt(messages) == [say("system", "add"), say("user", "1+1?")]


def test_texts_that_only_look_like_messages_stay_texts() -> None:
    for text in ("[1, 2]", "[]", '[{"role": "user"}]', '[{"role": "user", "content": "a"}] What is this?', "[{", "{}"):
        assert read_prompt(text) == text


def test_messages_as_the_text_of_a_python_list_or_of_half_a_json_list_are_told() -> None:
    assert "write them as JSON" in reason(read_prompt, str([say("user", "1+1?")]))
    assert "not JSON" in reason(read_prompt, '[{"role": "user", "content": "a" "b"}]')


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "no prompt"),
        ("", "empty prompt"),
        (" \n", "empty prompt"),
        ([say("user", " ")], "empty prompt"),
        ([], "no chat messages"),
        (3, "a prompt that is neither a text nor a list of chat messages"),
        (say("user", "a"), "a prompt that is neither a text nor a list of chat messages"),
        (["a"], "a chat message without role and content"),
        ([{"role": "user"}], "a chat message without role and content"),
        ([{"from": "human", "value": "a"}], "a chat message without role and content"),
        ([say(3, "a")], "a chat message whose role is not a text"),
        ([say(None, "a")], "a chat message whose role is not a text"),
        ([say("", "a")], "a chat message whose role is not a text"),
        ([say("user", "\ud800")], "half of a surrogate pair, which is no character"),
    ],
)
def test_what_is_no_prompt_says_why(value: Any, why: str) -> None:
    assert reason(read_prompt, value) == why


def test_a_last_message_of_the_assistant_is_continued() -> None:
    assert rendered([say("user", "1+1?")]) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    begun = rendered([say("user", "1+1?"), say("assistant", "It is ")])
    assert begun == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is "
    assert rendered([say("user", "1+1?"), say("assistant", "")]) == rendered([say("user", "1+1?")])


def test_a_template_that_refuses_names_its_reason() -> None:
    assert rendered([say("user", " a ")], ALTERNATING) == "[a]"
    why = reason(rendered, [say("user", "a"), say("user", "b")], ALTERNATING)
    assert why == "messages that the chat template refuses (roles must alternate)"
    for broken in ("{{ messages[9].content }}", "{{ 1 / 0 }}", "{% for", "{{ messages[0].content + 1 }}"):
        assert "messages that the chat template refuses (" in reason(rendered, [say("user", "a")], broken)
    long = reason(rendered, [say("user", "a"), say("assistant", "b" * 500)], "{{ messages[0].content }}")
    assert long.startswith("messages that the chat template refuses (ValueError") or len(long) < 150


def test_a_template_that_passes_over_a_message_is_told() -> None:
    assert rendered([say("user", "a /think")], KNOWN_ROLES) == "Q a ;", "a template may change a text"
    kept = rendered([say("user", "a"), say("assistant", "<think>b</think>c"), say("user", "d")], KNOWN_ROLES)
    assert kept == "Q a;A c;Q d;"
    assert reason(rendered, [say("system", "be brief"), say("user", "a")], KNOWN_ROLES).endswith("the role system")
    assert reason(rendered, [say("human", "a")], KNOWN_ROLES).endswith("the role human")


def test_messages_without_a_template_are_refused() -> None:
    tokenizer = character_tokenizer(1024)
    tokenizer.chat_template = None
    assert "no chat template" in reason(render, [say("user", "a")], tokenizer)


@pytest.mark.parametrize(
    "value", [" a", [say("assistant", " a")], json.dumps([say("assistant", [" a"])]), (say("assistant", " a"),)]
)
def test_a_demonstration_is_a_text_or_one_message_of_the_assistant(value: Any) -> None:
    assert read_response(value) == " a"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "no response"),
        (" ", "empty response"),
        ([say("assistant", "")], "empty response"),
        (float("nan"), "response that is not finite"),
        ([say("user", "a")], "a response that is not the assistant's"),
        ([say("assistant", "a"), say("user", "b")], "several messages"),
        ([say("assistant", "a", tool_calls=[{"b": 1}])], "with tool_calls"),
        ([say("assistant", "a", reasoning_content="b")], "with reasoning_content"),
        ([say("assistant", None)], "null content"),
        (["a"], "without role and content"),
        (say("assistant", "a"), "neither a text nor a list"),
        (str([say("assistant", "a")]), "write them as JSON"),
    ],
)
def test_what_cannot_be_imitated_says_why(value: Any, why: str) -> None:
    assert why in reason(read_response, value)


def test_numbers_are_imitated_as_their_digits() -> None:
    assert read_response(4.5) == "4.5"
