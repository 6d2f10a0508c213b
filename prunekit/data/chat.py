"""Convert conversations to text by the chat template of a tokenizer.

A row has ``messages`` and may have ``tools``. The content of a message is a text, or a list of
parts ``{"type": "text", "text": …}``. Templates differ: some write a text only, and would write a
list as Python prints it; some write parts only, and would write nothing of a text; some write both.
A template is tried once with a marked message, and each conversation is passed to it in a form that
it writes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

Message = dict[str, Any]
MARK = "prunekitprobe"
"""Text that no template holds; one word, so that no template changes it."""
SHAPE = '"messages" must be a list of {"role": …, "content": …}'


class ChatTemplate:
    """The chat template of a tokenizer, with the content forms it writes.

    Args:
        tokenizer: The tokenizer, or the processor of images and text.
        images: Whether a content may have parts ``{"type": "image"}``.
    """

    def __init__(self, tokenizer: Tokenizer, *, images: bool = False) -> None:
        self._tokenizer = tokenizer
        self._kinds = ("text", "image") if images else ("text",)

    def text(self, row: Mapping[str, Any], where: str) -> str:
        """Return the text of a conversation.

        Args:
            row: The row, with ``messages`` and maybe ``tools``.
            where: Its place, for messages.

        Raises:
            ConfigError: The row is no conversation, there is no template, or it cannot write all
                of the conversation.
        """
        messages = _messages(row["messages"], where, self._kinds)
        tools = _tools(row.get("tools"), where)
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f'{where}: "messages" needs a chat template, which this model\'s tokenizer lacks; '
                'give rows with "text"'
            )
        if tools and not self._writes_tools:
            raise ConfigError(
                f'{where}: has "tools", which this model\'s chat template does not write. Leave '
                "the column out, if the text is to have none"
            )
        try:
            return self._render([self._adapted(message, where) for message in messages], tools)
        except ConfigError:
            raise
        except Exception as error:  # a template can raise anything
            reason = str(error) or type(error).__name__
            raise ConfigError(f"{where}: the chat template rejects this row: {reason}") from error

    def _render(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        options: dict[str, Any] = {"tools": tools} if tools else {}
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _adapted(self, message: Message, where: str) -> Message:
        """Return a message with content in a form the template writes."""
        content = message.get("content")
        if self._writes_parts:
            if self._writes_text or not isinstance(content, str):
                return message
            return {**message, "content": [{"type": "text", "text": content}]}
        if not isinstance(content, list):
            return message
        if not self._writes_text or any(part["type"] == "image" for part in content):
            raise ConfigError(
                f"{where}: a content is a list of parts, and this model's chat template writes "
                "neither parts nor a text of one user; give each content as a text"
            )
        return {**message, "content": "\n".join(part["text"] for part in content)}

    @cached_property
    def _writes_text(self) -> bool:
        return MARK in self._tried(MARK)

    @cached_property
    def _writes_parts(self) -> bool:
        written = self._tried([{"type": "text", "text": MARK}])
        if self._writes_text:
            return written == self._tried(MARK)
        # As Python prints a part, its text is in quotes.
        return MARK in written and f"'{MARK}'" not in written and f'"{MARK}"' not in written

    @cached_property
    def _writes_tools(self) -> bool:
        parameters = {"type": "object", "properties": {}}
        function = {"name": MARK, "description": MARK, "parameters": parameters}
        content: Any = MARK if self._writes_text else [{"type": "text", "text": MARK}]
        messages = [{"role": "user", "content": content}]
        written = _try(self._render, messages, [{"type": "function", "function": function}])
        return bool(written) and written != _try(self._render, messages)

    def _tried(self, content: str | list[Message]) -> str:
        return _try(self._render, [{"role": "user", "content": content}])


def _try(render: Callable[..., str], *arguments: object) -> str:
    """Return the text that a template writes; empty if it raises."""
    try:
        return render(*arguments)
    except Exception:  # a template can raise anything
        return ""


def _messages(messages: Any, where: str, kinds: Sequence[str]) -> list[Message]:  # noqa: ANN401
    """Return the messages of a row without empty entries.

    A table has an empty entry where only other rows have a value.
    """
    if not (isinstance(messages, list) and messages):
        raise ConfigError(f"{where}: {SHAPE}")
    return [_message(message, where, kinds) for message in messages]


def _message(message: Any, where: str, kinds: Sequence[str]) -> Message:  # noqa: ANN401
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError(f"{where}: {SHAPE}")
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    if content is None and kept.get("tool_calls"):
        return {**kept, "content": ""}
    if isinstance(content, str):
        return kept
    if not (isinstance(content, list) and content):
        raise ConfigError(f"{where}: {SHAPE}, and content a text or a list of parts")
    return {**kept, "content": [_part(part, where, kinds) for part in content]}


def _part(part: Any, where: str, kinds: Sequence[str]) -> dict[str, Any]:  # noqa: ANN401
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in kinds or (kind == "text" and not isinstance(part.get("text"), str)):
        also = ', and {"type": "image"},' if "image" in kinds else ""
        raise ConfigError(
            f'{where}: a content has a part of type {kind!r}; only {{"type": "text", "text": '
            f"…}}{also} can be calibrated on"
        )
    return {"type": "text", "text": part["text"]} if kind == "text" else {"type": kind}


def _tools(tools: Any, where: str) -> list[Any] | None:  # noqa: ANN401  as parsed
    """Return the tools of a row; tables often hold them as JSON."""
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f'{where}: "tools" is text that is not JSON: {error}') from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f'{where}: "tools" must be a list of tables, or JSON of one')
    return tools
