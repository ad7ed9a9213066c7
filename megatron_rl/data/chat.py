"""Chat messages: as records hold them, and as the model's template writes them."""

import json
import re
from typing import TYPE_CHECKING, Any

from megatron_rl.data.intake import BrokenRecord, first_line, printable
from megatron_rl.data.values import plain, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

LIKE_JSON = re.compile(r"""\s*\[\s*\{\s*"(role|content)"\s*:.*\}\s*\]\s*""", re.DOTALL)
LIKE_PYTHON = re.compile(r"""\s*\[\s*\{\s*'(role|content)'\s*:.*\}\s*\]\s*""", re.DOTALL)

BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal")
"""Keys of a message with something that the model says, other than `content`."""
LONGEST_MESSAGE = 80  # characters of what a template raises
MARK = "\N{SYMBOL FOR SUBSTITUTE}"


def read_prompt(value: Any) -> str | Messages:
    """A prompt: a text, or chat messages, which may be written as JSON text.

    Raises:
        BrokenRecord: when it is neither, or empty.
    """
    value = plain(value)
    if value is None:
        raise BrokenRecord("no prompt")
    content = _messages_in(value) if isinstance(value, str) else value
    if isinstance(content, list):
        messages = read_messages(content)
        if not any(message["content"].strip() for message in messages):
            raise BrokenRecord("empty prompt")
        return messages
    if not isinstance(value, str):
        raise BrokenRecord("a prompt that is neither a text nor a list of chat messages")
    if not value.strip():
        raise BrokenRecord("empty prompt")
    return value


def read_response(value: Any) -> str:
    """A demonstration: a text or number, or, as TRL has it, a list with one message of the assistant.

    Raises:
        BrokenRecord: when it is neither, empty, or says something that its text does not.
    """
    value = plain(value)
    content = _messages_in(value) if isinstance(value, str) else value
    if isinstance(content, list):
        messages = read_messages(content)
        if len(messages) > 1:
            raise BrokenRecord("a response of several messages, of which only one can be imitated")
        if messages[0]["role"] != "assistant":
            raise BrokenRecord("a response that is not the assistant's")
        if beside := [key for key in BESIDE_CONTENT if messages[0].get(key)]:
            raise BrokenRecord(f"a response with {beside[0]}, of which only the content could be imitated")
        value = messages[0]["content"]
    elif isinstance(content, dict):
        raise BrokenRecord("a response that is neither a text nor a list of chat messages")
    return text_of(value, "response")


def _messages_in(text: str) -> list[Any] | None:
    """The chat messages that a text is the JSON of, or None for any other text."""
    if LIKE_PYTHON.fullmatch(text):
        raise BrokenRecord("chat messages as the text of a Python list; write them as JSON")
    if not text.lstrip().startswith("[") or '"role"' not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if LIKE_JSON.fullmatch(text):
            raise BrokenRecord("chat messages as text that is not JSON", first_line(error)) from None
        return None
    is_chat = bool(value) and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value)
    return plain(value) if is_chat else None


def read_messages(value: list[Any]) -> Messages:
    """Chat messages with texts as contents, without the empty fields that a table gives every message.

    Raises:
        BrokenRecord: when one of them is none, or has a content that is no text.
    """
    if not value:
        raise BrokenRecord("no chat messages")
    return [_message(message) for message in value]


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or "role" not in value or not ("content" in value or value.get("tool_calls")):
        raise BrokenRecord("a chat message without role and content")
    if not isinstance(value["role"], str) or not value["role"].strip():
        raise BrokenRecord("a chat message whose role is not a text")
    message = _without_nulls(value)
    if value.get("content") is None and value["role"] == "assistant" and message.get("tool_calls"):
        return message | {"content": ""}
    return message | {"content": _content(value.get("content"))}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _content(value: Any) -> str:
    """The text of a content; parts are joined by line ends, as vLLM's server does for models of texts."""
    if isinstance(value, str):
        return value
    if value is None:
        raise BrokenRecord("a chat message with null content")
    if not isinstance(value, list) or not value:
        raise BrokenRecord("a chat message whose content is neither a text nor a list of parts")
    return "\n".join(_part(part) for part in value)


def _part(value: Any) -> str:
    if isinstance(value, str):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        raise BrokenRecord(printable(f"a content part of type {kind}; only text can be read"))
    if not isinstance(value.get("text"), str):
        raise BrokenRecord("a content part without text")
    return str(value["text"])


def render(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Chat messages as the model's template writes them, up to where the response begins.

    A last message of the assistant is the beginning of the response; after any other the template's header of one is
    added.

    Raises:
        BrokenRecord: when the template refuses them, or does not write all of them.
    """
    if tokenizer.chat_template is None:
        raise BrokenRecord(
            "chat messages, but the tokenizer of model.path has no chat template: use a chat model or a column of "
            "texts as data.prompt_key"
        )
    text = _apply_template(messages, tokenizer)
    for place, message in enumerate(messages):
        content = message["content"].strip()
        # A template may change a text on purpose; one that has not read it does not notice a mark in it.
        if content and content not in text and not _is_read(messages, place, tokenizer):
            raise BrokenRecord(printable(f"the chat template leaves out a message of the role {message['role']}"))
    return text


def _apply_template(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> str:
    continues = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=not continues, continue_final_message=continues, tokenize=False
        )
    except Exception as error:  # a template can raise anything
        message = printable(first_line(error), LONGEST_MESSAGE)
        raise BrokenRecord(f"messages that the chat template refuses ({message})") from None
    return plain(text)


def _is_read(messages: Messages, place: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    marked = messages[place] | {"content": f"{messages[place]['content']} {MARK}"}
    try:
        return MARK in _apply_template([*messages[:place], marked, *messages[place + 1 :]], tokenizer)
    except BrokenRecord:
        return True
