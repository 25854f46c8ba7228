"""Prompt ids of one side: each model reads the prompt through its own tokenizer and its own template.

``plain`` is the plain-text prompt with whatever a plain call of the tokenizer puts in front (BOS), nothing behind.
``chat`` is the tokenizer's chat template up to the place where the assistant's content begins.

In both, the spelling of a control token in a user's text is text: ``<|im_end|>`` in a question never ends the turn.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from vocabridge.alignment import byte_spans
from vocabridge.alignment.family import tokenizer_name
from vocabridge.errors import UserError
from vocabridge.text import Example, Message

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Template = Literal["plain", "chat"]

# Ordinary words: a template that trims, splits or looks for markup in the content leaves them as they are.
_PROBE_QUESTION = "vocabridge probe question"
_PROBE_ANSWER = "vocabridge probe answer"


class PromptRenderer:
    """Renders the prompts of one side; make one per tokenizer and template and call it on each example.

    Attributes:
        template: ``plain`` or ``chat``.
        end_token_id: the id that ends a response. For ``chat``, the first control token that the template writes
            after the assistant's content; for ``plain``, and for a template that writes none, the EOS token.
        response_lead: spaces that the chat template writes right before the assistant's content (Llama 2 and Mistral
            write one). They belong to the first token of the response, not to the prompt; empty for ``plain``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "plain") -> None:
        """Read the roles off the tokenizer.

        Raises:
            UserError: there is no end token, or ``chat`` is asked of a tokenizer without a usable chat template.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.response_lead = ""
        self._opening_ids: list[int] = []
        end_token_id = None
        if template == "chat":
            end_token_id = self._read_chat_template()
        end_token_id = tokenizer.eos_token_id if end_token_id is None else end_token_id
        if end_token_id is None:
            raise UserError(
                f"{tokenizer_name(tokenizer)} has no end-of-sequence token, so a response cannot end; "
                "set tokenizer.eos_token."
            )
        self.end_token_id: int = end_token_id
        self._start_ids = _call_prefix(tokenizer)

    def __call__(self, example: Example) -> list[int]:
        """Ids of the prompt, never empty: something must predict the first token of the response.

        Raises:
            UserError: a plain prompt has no token and there is no BOS or EOS token to start from, or the chat template
                refuses the conversation or cannot keep the spelling of a control token apart from the token.
        """
        return self._plain_ids(example) if self.template == "plain" else self._chat_ids(example)

    def _plain_ids(self, example: Example) -> list[int]:
        ids = self._start_ids + byte_spans(self.tokenizer, example.prompt, specials="text").ids
        if ids:
            return ids
        # GPT-2 has no BOS token in its calls; its EOS token separates documents and so also begins one.
        for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if start is not None:
                return [start]
        raise UserError(
            f"{example.source}: the prompt is empty, and {tokenizer_name(self.tokenizer)} has neither "
            "a BOS nor an EOS token to start from."
        )

    def _chat_ids(self, example: Example) -> list[int]:
        messages = [{"role": message.role, "content": message.content} for message in example.messages]
        spelled = next(filter(None, (spelled_control_token(self.tokenizer, m.content) for m in example.messages)), None)
        options: dict[str, Any] = {"sanitize_control_tokens": True} if spelled else {}
        if (
            spelled
            and "sanitize_control_tokens" not in inspect.signature(self.tokenizer.apply_chat_template).parameters
        ):
            raise UserError(
                f"{example.source}: the text spells the control token '{spelled}'; keeping it as text under a chat "
                "template needs transformers 5.23 or later."
            )
        try:
            encoding = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
            )
        except Exception as error:
            # Templates are programs that raise what they like (jinja2.TemplateError, TypeError, ...).
            reason = f"the text spells the control token '{spelled}': {error}" if spelled else str(error)
            raise UserError(
                f"{example.source}: the chat template of {tokenizer_name(self.tokenizer)} cannot render the "
                f"conversation ({reason})."
            ) from error
        return list(cast("BatchEncoding", encoding)["input_ids"]) + self._opening_ids

    def _read_chat_template(self) -> int | None:
        """Learn from a probe what stands around the assistant's content; returns the end token's id."""
        question, answer = Message("user", _PROBE_QUESTION), Message("assistant", _PROBE_ANSWER)
        prompt = self._probe([question], add_generation_prompt=True)
        before, found, after = self._probe([question, answer], add_generation_prompt=False).rpartition(_PROBE_ANSWER)
        if not found:
            raise UserError(
                f"the chat template of {tokenizer_name(self.tokenizer)} does not write the assistant's content."
            )
        # What the template writes between its generation prompt and the content: often nothing, an empty thinking
        # block in Qwen 3, the final channel in gpt-oss, the whole header where the generation prompt is not supported.
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        self.response_lead = opening[len(opening.rstrip(" ")) :]
        self._opening_ids = _continuation_with_controls(self.tokenizer, opening.rstrip(" "))
        return _first_control_id(self.tokenizer, after)

    def _probe(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:
            name = tokenizer_name(self.tokenizer)
            if not self.tokenizer.chat_template:
                raise UserError(
                    f"{name} has no chat template; use template 'plain' or set its chat_template."
                ) from None
            raise UserError(f"the chat template of {name} fails on a plain conversation: {error}") from error
        return cast(str, text)


def render_prompt(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Prompt ids of one example; for many, make a ``PromptRenderer`` once."""
    return PromptRenderer(tokenizer, template)(example)


def spelled_control_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """The first control token (any added token that is not white space) whose spelling is in the text, or None."""
    spellings, first_characters = _control_spellings(tokenizer)
    # Most texts hold none of a few characters such as "<"; Gemma has 6,000 spellings to look for in the others.
    if not any(character in text for character in first_characters):
        return None
    return next((spelling for spelling in spellings if spelling in text), None)


@lru_cache(maxsize=8)
def _control_spellings(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], frozenset[str]]:
    spellings = tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content and not token.content.isspace() and token.content.strip("\u2581")
    )
    return spellings, frozenset(spelling[0] for spelling in spellings)


def _call_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a plain call puts before the text (BOS, CLS), without those it puts behind (EOS, SEP)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return full[: next(starts, 0)]


def _continuation_with_controls(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of template text after other template text; a newline in front keeps a prefix space from being added."""
    if not text:
        return []
    newline_ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    if ids[: len(newline_ids)] == newline_ids:
        return ids[len(newline_ids) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _first_control_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Id of the control token that comes first in a template's text; the longest where several begin together."""
    found = [spelling for spelling in _control_spellings(tokenizer)[0] if spelling in text]
    if not found:
        return None
    first = min(found, key=lambda spelling: (text.index(spelling), -len(spelling)))
    return cast(int, tokenizer.convert_tokens_to_ids(first))
