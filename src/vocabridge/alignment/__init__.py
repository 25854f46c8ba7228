"""Exact alignment of two tokenizations of one text, in UTF-8 bytes.

`byte_spans` and `encode_continuation` encode a text and say which bytes each token covers; `chunk_ids` pairs the token
ranges of two tokenizers that cover the same bytes; `token_bytes` and `shared_vocabulary` compare vocabularies,
`nearest_tokens`, `inverse_nearest_tokens` and `retokenized` translate the tokens of one into those of another;
`check_tokenizer_file` tells whether a tokenizer was loaded as its file says. Nothing here imports torch.
"""

from vocabridge.alignment.chunks import chunk_ids
from vocabridge.alignment.nearest_tokens import inverse_nearest_tokens, nearest_tokens
from vocabridge.alignment.retokenized import RaggedIds, retokenized
from vocabridge.alignment.spans import EncodedText, byte_spans, encode_continuation
from vocabridge.alignment.tokenizer_file import check_tokenizer_file
from vocabridge.alignment.vocabulary import SharedVocabulary, shared_vocabulary, token_bytes

__all__ = [
    "EncodedText",
    "RaggedIds",
    "SharedVocabulary",
    "byte_spans",
    "check_tokenizer_file",
    "chunk_ids",
    "encode_continuation",
    "inverse_nearest_tokens",
    "nearest_tokens",
    "retokenized",
    "shared_vocabulary",
    "token_bytes",
]
