"""Small tokenizers of every family, trained or built on the spot, for tests; no network, no files.

``conftest.py`` puts this folder on ``sys.path``, so a test imports it as ``from tokenizer_zoo import ...``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the dog sleeps in the warm sun.",
    "A language model learns to predict the next token; the student learns from the teacher.",
    "What is the capital of France? The capital of France is Paris.",
    "1. First boil the water.\n2. Then add the rice, and wait for 20 minutes.\n\n3. Serve it hot!",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))\t# gives 5",
    "Les élèves apprennent à l'école; ça coûte 3,50 euros, n'est-ce pas ?",
    "Der Schüler lernt von der Lehrerin; größere Übungen folgen später.",
    "El niño comió una manzana roja y bebió agua fría en el jardín.",
    "Быстрая лиса прыгает через ленивую собаку, и собака спит.",
    "敏捷的棕色狐狸跳过了懒狗。学生从老师那里学习语言模型。",
    "学生は先生から学びます。東京は日本の首都です。",
    "학생은 선생님에게서 배웁니다. 서울은 한국의 수도입니다.",
    "الطالب يتعلم من المعلم، والقط ينام في الشمس.",
    "התלמיד לומד מהמורה, והכלב ישן בשמש.",
    "नमस्ते दुनिया, छात्र शिक्षक से सीखता है।",
    "I love it 😀🎉👍 so much!!! ... (really) [yes] {ok} <tag> & more @ 100% #1",
]
"""Short multilingual training text: enough merges for words, few enough that rare characters split into bytes."""

_TIMES = 3  # the trainers drop pairs seen once; repetition keeps this small text above the threshold


def wrap(backend: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around a copy of a trained backend, without a post-processor."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()), **special_tokens)


def _corpus() -> list[str]:
    return CORPUS * _TIMES


def _commonest_characters(number: int) -> list[str]:
    """Chosen here, because a trainer that cuts an alphabet breaks ties differently in every process."""
    counts = Counter("".join(CORPUS).replace(" ", "▁"))
    return sorted(counts, key=lambda char: (-counts[char], char))[:number]


def _add_control(backend: Tokenizer, *spellings: str) -> None:
    backend.add_special_tokens([AddedToken(spelling, normalized=False, special=True) for spelling in spellings])


def byte_level_bpe(
    *,
    vocab_size: int = 700,
    normalizer: normalizers.Normalizer | None = None,
    prefix_space: bool = False,
    alphabet: list[str] | None = None,
    control: tuple[str, ...] = ("<|pad|>", "<|endoftext|>", "<|im_start|>"),
) -> PreTrainedTokenizerFast:
    """GPT-2's family; a short ``alphabet`` leaves bytes without a token, as SmolLM2 has."""
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(), trainer)
    pad, eos = control[0], control[1]
    return wrap(backend, pad_token=pad, eos_token=eos, bos_token=control[-1])


def sentencepiece_bpe(*, vocab_size: int = 800, style: str = "prepend") -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE with byte fallback: ``prepend``, ``metaspace`` (Llama) or ``replace`` (Gemma)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    control = ["<unk>", "<s>", "</s>", "<pad>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control + byte_pieces,
        initial_alphabet=_commonest_characters(180),
        limit_alphabet=180,
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(), trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
    backend = Tokenizer.from_str(json.dumps(state))
    strip = [decoders.Strip(" ", 1, 0)]
    if style == "prepend":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif style == "replace":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        strip = []
    else:
        raise ValueError(style)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def unigram(
    *,
    vocab_size: int = 600,
    byte_fallback: bool = False,
    normalizer: normalizers.Normalizer | None = None,
    words: bool = False,
) -> PreTrainedTokenizerFast:
    """The model itself holds the control spellings as pieces; ``words`` drops white space between words, as T5 does."""
    backend = Tokenizer(models.Unigram())
    if normalizer is not None:
        backend.normalizer = normalizer
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace]) if words else metaspace
    )
    control = ["<pad>", "</s>", "<unk>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)] if byte_fallback else []
    # Without an alphabet cut every character of the corpus would be known and <unk> never tried.
    text = [line for line in _corpus() if not any(ord(char) > 0x3000 for char in line)]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size + len(byte_pieces),
        special_tokens=control + byte_pieces,
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
    state["model"]["byte_fallback"] = byte_fallback
    backend = Tokenizer.from_str(json.dumps(state))
    spaces = decoders.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces]) if byte_fallback else spaces
    return wrap(backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def word_piece(*, vocab_size: int = 700, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """BERT's family; the lower-casing form also strips accents and deletes control characters."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    if lowercase:
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(_corpus(), trainer)
    return wrap(backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def clip_bpe(*, vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """CLIP's family: lower case, byte alphabet, a suffix at the end of each word, white space dropped."""
    backend = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{char}</w>" for char in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(), trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"].startswith("<|")]
    backend = Tokenizer.from_str(json.dumps(state))
    return wrap(backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def characters() -> PreTrainedTokenizerFast:
    """One token a character, ``<unk>`` for the rest."""
    known = sorted(set("".join(CORPUS[:8])))
    vocab = {piece: index for index, piece in enumerate(["<pad>", "<unk>", "</s>", *known])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    _add_control(backend, "<pad>", "<unk>", "</s>")
    return wrap(backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def raw_bytes() -> PreTrainedTokenizerFast:
    """One token a byte: byte-level BPE without merges, with added tokens that strip white space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    _add_control(backend, "<pad>", "</s>")
    backend.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("wörd", normalized=False)])
    return wrap(backend, pad_token="<pad>", eos_token="</s>")


def _squeezing() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])


def _plain_letters() -> normalizers.Normalizer:
    """ALBERT's: quotes, compatibility decomposition, no accents, lower case."""
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    return normalizers.Sequence([*quotes, normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])


def _alphabet_with_gaps() -> list[str]:
    """Without the bytes 04 06 13 14 16 1D F1 F2, the ones that SmolLM2 lacks; none is in the corpus."""
    controls = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    missing = set(controls.pre_tokenize_str("\x04\x06\x13\x14\x16\x1d")[0][0]) | {"ñ", "ò"}  # F1, F2 in that alphabet
    return sorted(set(pre_tokenizers.ByteLevel.alphabet()) - missing)


def _byt5() -> PreTrainedTokenizerBase:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level_bpe,
    "byte-level-nfc": lambda: byte_level_bpe(normalizer=normalizers.NFC()),
    "byte-level-nfkc": lambda: byte_level_bpe(normalizer=normalizers.NFKC()),
    "byte-level-prefix": lambda: byte_level_bpe(prefix_space=True),
    "byte-level-gaps": lambda: byte_level_bpe(alphabet=_alphabet_with_gaps()),
    "sentencepiece-prepend": sentencepiece_bpe,
    "sentencepiece-metaspace": lambda: sentencepiece_bpe(style="metaspace"),
    "sentencepiece-replace": lambda: sentencepiece_bpe(style="replace"),
    "unigram": unigram,
    "unigram-bytes": lambda: unigram(byte_fallback=True),
    "unigram-nfkc": lambda: unigram(normalizer=_squeezing()),
    "unigram-words": lambda: unigram(words=True),
    "unigram-words-nfkd": lambda: unigram(words=True, normalizer=_plain_letters()),
    "clip-nfc": clip_bpe,
    "wordpiece-lower": word_piece,
    "wordpiece-cased": lambda: word_piece(lowercase=False),
    "characters": characters,
    "bytes": raw_bytes,
    "byt5": _byt5,
}
"""Name -> builder, one for each family that ``vocabridge.alignment`` covers; each takes well under a second."""
