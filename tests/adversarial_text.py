"""Texts that break tokenizers' offsets: a seeded generator and a hypothesis strategy over the same atoms."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import strategies as st

_SPACES = [" ", "  ", "     ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x1c"]
_WORDS = ["a", "the", " dog", "The", "n't", "1", "23", "3.50", "sun", "_", "-", "...", "''", "``", "):\n", "x" * 130]
_ACCENTS = ["é", "e\u0301", "\u0301", "\u0323", "a\u0323\u0301", "ñ", "Å", "\u212b", "İ", "ß", "q\u0307\u0323", "ö"]
_SCRIPTS = [
    "学生",
    "東京は",
    "한국",
    "\u1112\u1161\u11ab",
    "العربية",
    "שלום",
    "नमस्ते",
    "ภาษาไทย",
    "Быстрая",
    "\u09c7\u09be",
]
_SYMBOLS = [
    "😀",
    "👍🏽",
    "👩‍💻",
    "🏳️‍🌈",
    "ﬁ",
    "½",
    "…",
    "ﷺ",
    "ｆｕｌｌ",
    "\u200b",
    "\u200f",
    "\ufeff",
    "€",
    "\U00040000",
]
_CONTROLS = ["\x00", "\x04", "\x06", "\x14", "\x1d", "\x7f", "\u0085", "\uffff"]
_SPELLINGS = [
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<eos>",
    "<|endoftext|>",
    "<|im_start|>",
    "[UNK]",
    "[SEP]",
    "<extra_id_0>",
]
_ALPHABETS = ["▁", "▁▁", "Ġ", "Ċ", "##", "<0x41>", "<0x0A>", "<0x4", "</w>", "<tool>", "wörd", "<table>", "＜/s＞"]

ATOMS = [*_SPACES, *_WORDS, *_ACCENTS, *_SCRIPTS, *_SYMBOLS, *_CONTROLS, *_SPELLINGS, *_ALPHABETS]


def adversarial_texts(count: int, *, seed: int) -> Iterator[str]:
    """``count`` texts of up to a dozen atoms; half are runs within one group of atoms, where normalisers meet."""
    generator = random.Random(seed)
    groups = [ATOMS, [*_SPACES, "a", "the", "</s>"], [*_ACCENTS, "a", " "], [*_SYMBOLS, *_CONTROLS, "e"]]
    for index in range(count):
        atoms = ATOMS if index % 2 else generator.choice(groups)
        yield "".join(generator.choices(atoms, k=generator.randint(0, 12)))


texts = st.lists(st.one_of(st.sampled_from(ATOMS), st.text(max_size=4)), max_size=10).map("".join)
"""Hypothesis strategy: atoms mixed with arbitrary characters (no lone surrogates)."""
