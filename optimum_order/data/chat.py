"""Conversations -> text, through the chat template of the model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from optimum_order.data.rows import ROLE_AND_CONTENT
from optimum_order.errors import DataError

_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of roles in ShareGPT and its kin, and what chat templates call them."""


@dataclass
class Conversations:
    """Renders the conversations of one source.

    Args:
        name: The name of the source, for messages.
        tokenizer: The model's tokenizer.
        template: The chat template; by default that of the tokenizer.

    Attributes:
        refused: Conversations that the template refuses, such as two questions in a row.
        rendered: Conversations that it took.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    template: Any = None
    refused: int = field(default=0, init=False)
    rendered: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.template = self.tokenizer.chat_template or self.template
        if not self.template:
            raise DataError(
                f"The conversations of {self.name} need a chat template, and the tokenizer has "
                "none. Give data with a column of text, or a tokenizer with a chat_template."
            )

    def render(self, place: str, conversation: Any) -> str | None:
        """Return a conversation as text; None for one that is empty, or that is refused.

        Args:
            place: The place of the conversation in the source, for messages.
            conversation: Turns, each with a role and a content, or with from and value.

        Raises:
            DataError: If the conversation is no list of turns.
        """
        if conversation is None or (isinstance(conversation, list) and not conversation):
            return None
        turns = [self._turn(place, turn) for turn in self._turns(place, conversation)]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self._chosen(), tokenize=False
            )
        except Exception:  # a template can raise anything, and its message may hold the text
            self.refused += 1
            return None
        self.rendered += 1
        # windows and documents begin with BOS already
        begin = self.tokenizer.bos_token
        return str(text).removeprefix(begin) if isinstance(begin, str) else str(text)

    def note(self) -> str:
        """Return the remark about conversations that were left out, or "".

        Raises:
            DataError: If all of them were.
        """
        if self.refused and not self.rendered:
            raise DataError(
                f"The chat template of the tokenizer refuses all {self.refused} conversations of "
                f"{self.name}: their roles may be in an order that it does not know. Give other "
                "data, or a column of text."
            )
        if not self.refused:
            return ""
        total = self.refused + self.rendered
        return f"the chat template refuses {self.refused} of {total} conversations of {self.name}"

    def _chosen(self) -> str:
        """Return the template itself: a tokenizer may have several by name."""
        template = self.template
        if isinstance(template, Mapping):
            template = template.get("default") or next(iter(template.values()))
        return str(template)

    def _turns(self, place: str, conversation: Any) -> list[Any]:
        if isinstance(conversation, (list, tuple)):
            return list(conversation)
        raise DataError(
            f"'{self.name}', {place}: a conversation must be a list of turns, got "
            f"{type(conversation).__name__}."
        )

    def _turn(self, place: str, turn: Any) -> dict[str, Any]:
        """Return a turn as chat templates read it: a role, and its content as text."""
        if isinstance(turn, Mapping):
            for role, content in ROLE_AND_CONTENT:
                if isinstance(turn.get(role), str):
                    others = {key: value for key, value in turn.items() if value is not None}
                    others.pop("from", None)
                    others.pop("value", None)
                    name = _ROLES.get(turn[role].lower(), turn[role])
                    text = self._text(place, turn.get(content))
                    return others | {"role": name, "content": text}
        raise DataError(
            f"'{self.name}', {place}: a turn must have 'role' and 'content', or 'from' and 'value'."
        )

    def _text(self, place: str, content: Any) -> str:
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if isinstance(content, (list, tuple)):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) == len(parts):
                return "".join(texts)
        raise DataError(
            f"'{self.name}', {place}: the content of a turn must be text, got "
            f"{type(content).__name__} with parts of another kind."
        )
