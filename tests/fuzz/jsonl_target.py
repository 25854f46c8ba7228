"""The JSONL reader under arbitrary bytes: it yields examples or says in one sentence which line is wrong.

What a line holds is judged here anew, by ``json`` and plain rules, so that the reader cannot agree with itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from adversarial_text import ATOMS
from vocabridge.errors import UserError
from vocabridge.text import PROMPT_FIELDS, RESPONSE_FIELDS, Example, iter_examples

BOM = b"\xef\xbb\xbf"


def check(content: bytes, folder: Path) -> str:
    """Read a file with this content; gives ``read`` or ``refused``.

    Raises:
        AssertionError: something else than examples and a sentence came out, or the wrong ones.
    """
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    found: list[Example] = []
    sentence = None
    try:
        for example in iter_examples(path):
            found.append(example)
    except UserError as error:
        sentence = str(error)
    lines = content.removeprefix(BOM).split(b"\n")
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    for number, example in zip(numbers, found, strict=False):
        _check_example(lines[number - 1], example, f"{path}:{number}")
    if sentence is None:
        assert len(found) == len(numbers) > 0
        return "read"
    assert sentence.isprintable(), "a terminal would act on what the data say"
    if not numbers:
        assert sentence.startswith(f"{path}: there are no rows")
        return "refused"
    wrong = numbers[len(found)]
    assert re.match(re.escape(f"{path}:{wrong}") + r"\b", sentence), (sentence, wrong)
    assert not _is_good(lines[wrong - 1]), f"a good row was refused: {lines[wrong - 1]!r}: {sentence}"
    return "refused"


def _check_example(line: bytes, example: Example, source: str) -> None:
    row = json.loads(line.decode())
    assert isinstance(row, dict)
    assert example.source == source
    texts = set(_strings(row))
    assert example.response in texts
    assert set(example.references) <= texts
    assert example.references[0] == example.response
    for message in example.messages:
        assert message.role in ("system", "user", "assistant")
        message.content.encode()
    assert example.messages[-1].role == "user"
    (example.prompt + "".join(example.references)).encode()


def _is_good(line: bytes) -> bool:
    """The plainest form of a row, which must never be refused."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    if not isinstance(row, dict) or set(row) != {"prompt", "response"}:
        return False
    return all(isinstance(value, str) and not re.search("[\ud800-\udfff]", value) for value in row.values()) and (
        line.decode().count('"prompt"') == line.decode().count('"response"') == 1
    )


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)]


# --- what is tried ---------------------------------------------------------------------------------------------------

ANY_TEXT = st.one_of(
    st.sampled_from([*ATOMS, "\ud83d", "\udfff"]), st.text(max_size=6), st.text(st.characters(), max_size=4)
)
"""Lone surrogates included."""

_FIELDS = st.sampled_from(
    [*PROMPT_FIELDS, *RESPONSE_FIELDS, "input", "role", "content", "Prompt", "", "\n", "a\x1b[31m", "\ud800", "\u2028"]
)
_VALUES = st.recursive(
    st.one_of(
        ANY_TEXT,
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(),
        st.sampled_from(["user", "assistant", "system"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_FIELDS, inner, max_size=3)),
    max_leaves=6,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user"] * 3 + ["assistant"] * 3 + ["system", "a\nb"]), "content": ANY_TEXT}
    ),
    max_size=4,
)
_ROWS = st.one_of(
    st.fixed_dictionaries({"prompt": ANY_TEXT, "response": ANY_TEXT}),
    st.fixed_dictionaries({"prompt": ANY_TEXT, "output": st.lists(ANY_TEXT, max_size=2)}),
    st.fixed_dictionaries({"instruction": ANY_TEXT, "input": ANY_TEXT, "completion": ANY_TEXT}),
    st.fixed_dictionaries({"messages": _MESSAGES}),
    st.fixed_dictionaries({"prompt": _MESSAGES, "completion": _MESSAGES}),
    st.dictionaries(_FIELDS, _VALUES, max_size=4),
)


def _line(row: Any, ascii_only: bool) -> bytes:
    return json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


_WHOLE_LINES = st.builds(_line, _ROWS, st.booleans())
_PLAIN_TEXT = st.one_of(st.sampled_from(ATOMS), st.text(max_size=6))
_TURN = st.fixed_dictionaries({"role": st.just("user"), "content": _PLAIN_TEXT})
_GOOD_LINES = st.builds(
    _line,
    st.one_of(
        st.fixed_dictionaries({"prompt": _PLAIN_TEXT, "response": _PLAIN_TEXT}),
        st.fixed_dictionaries({"instruction": _PLAIN_TEXT, "input": _PLAIN_TEXT, "output": _PLAIN_TEXT}),
        st.fixed_dictionaries({"prompt": st.tuples(_TURN), "response": st.lists(_PLAIN_TEXT, min_size=1, max_size=2)}),
        st.builds(lambda turn, text: {"messages": [turn, {"role": "assistant", "content": text}]}, _TURN, _PLAIN_TEXT),
    ),
    st.booleans(),
)
_DEEP = st.builds(
    lambda opening, depth: b'{"prompt": ' + opening * depth, st.sampled_from([b"[", b'{"a":']), st.integers(1, 3000)
)
_OTHER_LINES = st.one_of(
    st.binary(max_size=12),
    _DEEP,
    st.sampled_from(
        [
            b"",
            b" \t\r",
            b"\xef\xbb\xbf",
            b"null",
            b"[]",
            b'"x"',
            b"NaN",
            b"1" * 5000,
            b'{"prompt": "a", "prompt": "b", "response": "c"}',
            b'{"prompt": "\\ud800", "response": "x"}',
            b'{"prompt": "\x00", "response": "x"}',
        ]
    ),
)


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A good file with a few bytes cut out, repeated, replaced or put in."""
    content = bytearray(b"\n".join(draw(st.lists(_GOOD_LINES, min_size=1, max_size=4))))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 4)))
        piece = draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"\n", b'"', b"\\u", b"}", b"\xc0", b"\r"])))
        content[start:end] = draw(st.sampled_from([piece, bytes(content[start:end]) * 2]))
    return bytes(content)


FILES = st.one_of(
    st.builds(
        lambda first, lines, end: first + end.join(lines),
        st.sampled_from([b"", BOM]),
        st.one_of(
            st.lists(_GOOD_LINES, min_size=1, max_size=4),
            st.lists(st.one_of(_GOOD_LINES, _WHOLE_LINES, _OTHER_LINES), max_size=4),
        ),
        st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    ),
    _mutated(),
    st.binary(max_size=64),
)
"""Bytes of a JSONL file: good, broken, or none."""
