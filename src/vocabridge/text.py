"""Rows of text, in any of the usual forms, as examples: a prompt, its response and its references.

Row forms, tried in this order; a null field counts as absent:

1. chat: ``messages``, a list of ``{"role", "content"}``; the last one is the assistant's and is the response.
2. prompt and response: ``prompt`` with ``output``, ``response`` or ``completion`` (the first of these that is there).
   ``prompt`` is a string or a list of messages, the response a string or a list with one assistant message (TRL's
   conversational form). When ``instruction`` is there too, ``prompt`` is the plain form and the chat form is built from
   ``instruction`` and ``input``.
3. instruction: ``instruction``, optionally ``input``, and a response. The plain prompt is the Alpaca template.

A response that is a list of strings holds several references; the first is the response that is trained on. An empty
response is kept here; ``vocabridge.pairs`` drops and counts it. Every example has both a plain and a chat form of its
prompt, so that either side of a distillation can use either template.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any

from vocabridge.errors import UserError, visible
from vocabridge.suggest import did_you_mean

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

PROMPT_FIELDS = ("prompt", "instruction", "messages")
RESPONSE_FIELDS = ("output", "response", "completion")
ROLES = ("system", "user", "assistant")

_LONGEST_TEXT = 2**22
"""Characters of a field; tokens of a longer one would fill the memory before it is cut to ``max_length``."""
_LONGEST_LINE = 2**26
"""Bytes of a line; a file that is one line must not be read whole to be refused."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a prompt in both forms and the response to it.

    Attributes:
        prompt: the plain-text form.
        messages: the chat form, without the response; the last message is the user's.
        response: the text that is trained on; may be empty.
        references: acceptable responses; the first is ``response``.
        source: where the row came from, such as ``train.jsonl:12``.
    """

    prompt: str
    messages: tuple[Message, ...]
    response: str
    references: tuple[str, ...]
    source: str


ExampleSource = str | PathLike[str] | Iterable[Mapping[str, Any] | Example | str | PathLike[str]]
"""A JSON-lines file, a folder or hub id of ``datasets`` (``name`` or ``name:split``), a dataset, or rows.

A list or tuple of names stands for these sources one after the other.
"""


def read_examples(source: ExampleSource, *, split: str | None = None, limit: int | None = None) -> list[Example]:
    """Read a source into a list.

    Args:
        source: see ``ExampleSource``.
        split: of a dataset with several splits; may be written ``name:split`` instead.
        limit: read this many rows at most.

    Raises:
        UserError: the source is missing or empty, or a row is broken; names the file, line and field.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}.")
    return list(islice(iter_examples(source, split=split), limit and min(limit, sys.maxsize)))


def iter_examples(source: ExampleSource, *, split: str | None = None) -> Iterator[Example]:
    """Read a source row by row, holding one row in memory; arguments and errors as in ``read_examples``.

    A missing source is reported at once, a broken row when it is reached, an empty source at its end.
    """
    if isinstance(source, str | PathLike):
        return _parsed(_named_rows(str(source), split), str(source))
    if isinstance(source, Mapping):
        return _parsed(_indexed_rows(_pick_split(source, "the dataset", split), "rows"), "the dataset")
    if isinstance(source, list | tuple) and source and all(isinstance(name, str | PathLike) for name in source):
        return chain(*[iter_examples(name, split=split) for name in source])
    if split is not None:
        raise UserError(f"split {split!r} was given, but the rows given have no splits.")
    return _parsed(_indexed_rows(source, "rows"), "the rows given")


def parse_row(row: object, source: str) -> Example:
    """Turn one row into an example.

    Args:
        row: a mapping in one of the forms above, or an ``Example``, which is returned as it is.
        source: where the row stands, for error messages and ``Example.source``.

    Raises:
        UserError: the row has no prompt or response, or a field of the wrong type.
    """
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise UserError(f"{source}: a row must be an object with named fields, not {_kind(row)}.")
    fields = {name: value for name, value in row.items() if value is not None}
    if "messages" in fields:
        *prompt_messages, answer = _conversation(fields["messages"], source, "messages", last_role="assistant")
        return _example(None, tuple(prompt_messages), (answer.content,), source)
    references = _references(fields, source)
    prompt, messages = _prompt(fields, source)
    return _example(prompt, messages, references, source)


def row_with_response(example: Example, response: str) -> dict[str, Any]:
    """A row with the example's prompt, in both forms, and another response; :func:`parse_row` reads it back."""
    if len(example.messages) > 1:  # the plain form of a conversation is made from its messages
        turns = (*example.messages, Message("assistant", response))
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}
    (message,) = example.messages
    if message.content == example.prompt:
        return {"prompt": example.prompt, "output": response}
    return {"prompt": example.prompt, "instruction": message.content, "output": response}


def plain_prompt(messages: tuple[Message, ...]) -> str:
    r"""Write a conversation as plain text.

    A single user message is its content and a newline. Anything longer has a heading for each turn and ends in the
    assistant's. The newline at the end keeps the last token of the prompt apart from the first of the response.

    >>> plain_prompt((Message("user", "Who wrote Emma?"),))
    'Who wrote Emma?\n'
    >>> plain_prompt((Message("system", "Be brief."), Message("user", "Who wrote Emma?")))
    'System:\nBe brief.\n\nUser:\nWho wrote Emma?\n\nAssistant:\n'
    """
    if len(messages) == 1:
        return f"{messages[0].content}\n"
    turns = [f"{message.role.capitalize()}:\n{message.content}\n\n" for message in messages]
    return "".join(turns) + "Assistant:\n"


# --- one row ---------------------------------------------------------------------------------------------------------


def _example(prompt: str | None, messages: tuple[Message, ...], references: tuple[str, ...], source: str) -> Example:
    plain = plain_prompt(messages) if prompt is None else prompt
    return Example(prompt=plain, messages=messages, response=references[0], references=references, source=source)


def _prompt(fields: Mapping[str, Any], source: str) -> tuple[str | None, tuple[Message, ...]]:
    """The plain prompt (None: derive it from the messages) and the chat form."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list | tuple):
        return None, _conversation(prompt, source, "prompt", last_role="user")
    if prompt is not None:
        prompt = _text(prompt, source, "prompt")
    if "instruction" in fields:
        instruction = _text(fields["instruction"], source, "instruction")
        context = _text(fields.get("input", ""), source, "input")
        plain = prompt if prompt is not None else _alpaca_prompt(instruction, context)
        return plain, (Message("user", f"{instruction}\n\n{context}" if context else instruction),)
    if prompt is None:
        raise _missing("prompt", PROMPT_FIELDS, fields, source)
    return prompt, (Message("user", prompt),)


def _alpaca_prompt(instruction: str, context: str) -> str:
    if context:
        return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction, input=context)
    return ALPACA_PROMPT.format(instruction=instruction)


def _references(fields: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """The responses of a row that is not in the messages form; never an empty tuple."""
    field = next((name for name in RESPONSE_FIELDS if name in fields), None)
    if field is None:
        raise _missing("response", (*RESPONSE_FIELDS, "messages"), fields, source)
    value = fields[field]
    if not isinstance(value, list | tuple):
        return (_text(value, source, field),)
    if not value:
        raise UserError(f"{source}: '{field}' is an empty list; give at least one response.")
    if isinstance(value[0], Mapping):
        return (_answer(value, source, field),)
    return tuple(_text(text, source, f"{field}[{index}]") for index, text in enumerate(value))


def _answer(value: list[Any] | tuple[Any, ...], source: str, field: str) -> str:
    """The content of a completion that is a list with one assistant message."""
    message = _message(value[0], source, f"{field}[0]")
    if len(value) > 1 or message.role != "assistant":
        raise UserError(
            f"{source}: '{field}' must hold exactly one message, the assistant's; "
            f"it holds {len(value)}, the first by '{message.role}'."
        )
    return message.content


def _conversation(value: object, source: str, field: str, *, last_role: str) -> tuple[Message, ...]:
    """Messages in a valid order: optionally system, then user and assistant in turn, ending with ``last_role``."""
    if not isinstance(value, list | tuple):
        raise UserError(f"{source}: '{field}' must be a list of messages, not {_kind(value)}.")
    messages = tuple(_message(item, source, f"{field}[{index}]") for index, item in enumerate(value))
    order = f"an optional system message, then user and assistant in turn, ending with the {last_role}"
    expected = "user"
    for index, message in enumerate(messages):
        if index == 0 and message.role == "system":
            continue
        if message.role != expected:
            raise UserError(
                f"{source}: {field}[{index}].role is '{message.role}' where '{expected}' is expected ({order})."
            )
        expected = "assistant" if expected == "user" else "user"
    if not messages or messages[-1].role != last_role:
        last = f"ends with '{messages[-1].role}'" if messages else "is empty"
        raise UserError(f"{source}: '{field}' {last} ({order}).")
    return messages


def _message(value: object, source: str, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {field} must be an object with 'role' and 'content', not {_kind(value)}.")
    for name in ("role", "content"):
        if name not in value:
            raise UserError(f"{source}: {field} has no '{name}'{did_you_mean(name, map(str, value)) or '.'}")
    role = _text(value["role"], source, f"{field}.role")
    if role not in ROLES:
        raise UserError(
            f"{source}: {field}.role is '{visible(role)}'{did_you_mean(role, ROLES) or '.'} "
            f"Accepted: {', '.join(ROLES)}."
        )
    return Message(role, _text(value["content"], source, f"{field}.content"))


def _text(value: object, source: str, field: str) -> str:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise UserError(f"{source}: '{field}' must be a string, not {_kind(value)}.")
    if len(value) > _LONGEST_TEXT:
        raise UserError(
            f"{source}: '{field}' has {len(value):,} characters, more than {_LONGEST_TEXT:,}; split it into rows or "
            "shorten it (what is beyond max_length tokens is not trained on)."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source}: '{field}' holds half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character "
            f"{error.start}, which is no text; remove it or write the whole character."
        ) from None
    return value


def _missing(what: str, accepted: tuple[str, ...], fields: Mapping[str, Any], source: str) -> UserError:
    hints = (did_you_mean(str(name), accepted) for name in fields if name not in PROMPT_FIELDS + RESPONSE_FIELDS)
    hint = next(filter(None, hints), "")
    found = ", ".join(f"'{visible(str(name))}'" for name in fields) or "none"
    expected = " or ".join(f"'{name}'" for name in accepted)
    return UserError(f"{source}: no {what}: expected a field {expected}{hint or '.'} Fields found: {found}.")


def _kind(value: object) -> str:
    """What a JSON author calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


# --- sources ---------------------------------------------------------------------------------------------------------


def _parsed(rows: Iterator[tuple[str, object]], name: str) -> Iterator[Example]:
    empty = True
    for source, row in rows:
        empty = False
        yield parse_row(row, source)
    if empty:
        raise UserError(f"{name}: there are no rows.")


def _indexed_rows(rows: Iterable[object], name: str) -> Iterator[tuple[str, object]]:
    return ((f"{name}[{index}]", row) for index, row in enumerate(rows))


def _named_rows(name: str, split: str | None) -> Iterator[tuple[str, object]]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _dataset_rows(name, split)
    if path.exists():
        if not path.is_file():
            raise UserError(f"{name}: is a pipe or a device, and data are read more than once; write them to a file.")
        if split is not None:
            raise UserError(f"{name}: split {split!r} was given, but a JSON-lines file has no splits.")
        return _jsonl_rows(path)
    # Splits may be sliced, as in "name:train[:100]", so the name runs to the last colon that leaves a split behind.
    match = re.fullmatch(r"(.+):(\w[\w.-]*(?:\[[^\]]*\])?)", name)
    if match and split is None:
        return _named_rows(match[1], match[2])
    if _looks_like_a_path(name):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: there is no such file or folder{did_you_mean(path.name, siblings) or '.'}")
    return _dataset_rows(name, split)


def _looks_like_a_path(name: str) -> bool:
    """Whether a name that is not on disk was meant as a path, not as a hub id."""
    if name.startswith((".", "/", "~")) or Path(name).suffix in {".json", ".jsonl", ".ndjson", ".txt", ".csv"}:
        return True
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    return _jsonl_lines(file, path)


def _jsonl_lines(file: Any, path: Path) -> Iterator[tuple[str, object]]:
    # Binary lines end at "\n" only: text mode would also count a lone "\r", and some editors U+2028.
    opens_array = False
    with file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), start=1):
            if len(line) > _LONGEST_LINE:
                raise UserError(
                    f"{path}:{number}: the line is longer than {_LONGEST_LINE:,} bytes; write one row per line, and "
                    "leave out fields that are not prompt or response."
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                opens_array = line.lstrip().startswith(b"[")
            if line.strip():
                yield f"{path}:{number}", _json_value(line, f"{path}:{number}", opens_array=opens_array)


class _GivenTwiceError(Exception):
    """A key of a JSON object that stands in it twice; of the two values one would be lost without a word."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _GivenTwiceError(next(key for key in found if keys.count(key) > 1))
    return found


def _json_value(line: bytes, source: str, *, opens_array: bool) -> object:
    hint = " The file looks like one JSON array; write one object per line instead." if opens_array else ""
    try:
        value = json.loads(line.decode("utf-8").rstrip("\r\n"), object_pairs_hook=_unique_keys)
    except _GivenTwiceError as error:
        raise UserError(f"{source}: '{visible(str(error))}' is given twice in one object; keep one.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: byte {error.start} of the line (0x{line[error.start]:02x}) is not UTF-8; "
            "a JSON-lines file in UTF-8 is expected; convert it."
        ) from None
    except json.JSONDecodeError as error:
        hint = hint or " Write one whole JSON object per line."
        raise UserError(f"{source}: broken JSON at column {error.colno}: {error.msg}.{hint}") from None
    except RecursionError:
        raise UserError(f"{source}: broken JSON: it is nested too deeply; a row holds texts and messages.") from None
    except ValueError:  # of Python's own limit, told in terms of Python
        raise UserError(f"{source}: broken JSON: it holds a number of too many digits; write it as text.") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}: a line must be a JSON object, not {_kind(value)}.{hint}")
    return value


def _dataset_rows(name: str, split: str | None) -> Iterator[tuple[str, object]]:
    """Rows of a saved dataset or of anything ``datasets.load_dataset`` opens; memory-mapped, so rows stay on disk."""
    import datasets

    folder = Path(name).expanduser()
    saved = any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            _check_data_files(datasets.load_dataset_builder(str(folder)).config.data_files, folder)
        dataset = datasets.load_from_disk(folder) if saved else datasets.load_dataset(str(folder), split=split)
    except UserError:
        raise
    except Exception as error:
        # Loaders run format and network code and raise whatever that raises.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: not a JSON-lines file, and 'datasets' cannot load it: {reason}") from error
    if isinstance(dataset, Mapping):
        dataset = _pick_split(dataset, name, split)
    elif saved and split is not None:
        raise UserError(f"{name}: split {split!r} was given, but the saved dataset has no splits.")
    return _indexed_rows(_without_media(dataset, name), name)


def _check_data_files(files: Mapping[str, Iterable[str]] | None, folder: Path) -> None:
    """A dataset's card may name any file of this machine as its rows; only the dataset's own are read."""
    own = f"{folder.absolute()}/" if folder.is_dir() else "hf://"
    for file in (str(each) for split in (files or {}).values() for each in split):
        if not file.startswith(own) or ".." in Path(file).parts:
            raise UserError(f"{folder}: its card (README.md) names '{visible(file)}', which lies outside of it.")


def _without_media(dataset: Any, name: str) -> Any:
    """The dataset without images, sound and the like: reading such a cell opens the file or address that it names."""
    from datasets.features.features import require_decoding

    media = [column for column, feature in (dataset.features or {}).items() if require_decoding(feature)]
    if wanted := [column for column in media if column in (*PROMPT_FIELDS, *RESPONSE_FIELDS, "input")]:
        kind = type(dataset.features[wanted[0]]).__name__
        raise UserError(f"{name}: the column '{wanted[0]}' holds no text ({kind}); rename it or write its text.")
    return dataset.remove_columns(media) if media else dataset


def _pick_split(splits: Mapping[str, Any], name: str, split: str | None) -> Iterable[object]:
    known = ", ".join(map(str, splits))
    if split is None:
        if len(splits) != 1:
            raise UserError(f"{name}: say which split, as in 'NAME:SPLIT'. Splits: {known}.")
        return next(iter(splits.values()))
    if split not in splits:
        raise UserError(f"{name}: there is no split '{split}'{did_you_mean(split, splits) or '.'} Splits: {known}.")
    return splits[split]
