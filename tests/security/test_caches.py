"""Cache files from strangers: whatever a file claims about itself is checked before its bytes are mapped or used."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from safetensors.torch import load_file, save_file

from vocabridge.alignment import vocabulary_cache
from vocabridge.errors import UserError
from vocabridge.models.cache_shards import ShardWriter
from vocabridge.models.teacher_cache import CACHE_FILE, CacheKey, create_cache, open_cache
from vocabridge.models.teacher_rows import TeacherRow

WIDTH = 4
KEY = CacheKey(teacher="a" * 32, compute_dtype="float32", attention="sdpa", hidden_size=WIDTH, storage_dtype="float32")
INDEX = ("response_ids", "spans", "prompts", "lengths", "checksums")

Tensors = dict[str, torch.Tensor]
Header = dict[str, Any]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """The only shard of a cache with two rows of three and two positions."""
    create_cache(tmp_path, KEY)
    with ShardWriter(tmp_path, torch.float32) as writer:
        for number, length in enumerate((3, 2)):
            spans = np.stack([np.arange(length), np.arange(length) + 1], axis=1)
            row = TeacherRow(np.arange(2 + length) + 10 * number, spans)
            writer.add(row, torch.full((length, WIDTH), float(number)))
    (path,) = tmp_path.glob("*.safetensors")
    assert len(open_it(path)) == 2
    return path


def open_it(shard: Path) -> Any:
    cache = open_cache(shard.parent, KEY)
    assert cache is not None
    return cache


def sign(shard: Path) -> None:
    """Make the facts beside a shard agree with it, as whoever forges a shard would."""
    path = shard.with_suffix(".json")
    facts = json.loads(path.read_text()) | {"num_bytes": shard.stat().st_size}
    try:
        tensors = load_file(shard)
        checksum = 0
        for name in INDEX:
            checksum = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().tobytes(), checksum)
        facts["index_checksum"] = checksum
    except Exception:
        pass  # a file that the library itself does not read
    path.write_text(json.dumps(facts))


def rewrite(shard: Path, change: Callable[[Header], None], *, header_length: int | None = None) -> None:
    """Change the header of a safetensors file, and perhaps the length that it claims to have; its data stay."""
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: Header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    size = len(text) if header_length is None else header_length
    shard.write_bytes(struct.pack("<Q", size) + text + content[8 + length :])
    sign(shard)


def offsets(name: str, start: int, end: int) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[name]["data_offsets"] = [start, end]

    return change


def shape(name: str, *sizes: int) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[name]["shape"] = list(sizes)

    return change


def nothing(header: Header) -> None:
    pass


HEADERS: dict[str, Callable[[Header], None]] = {
    "offsets beyond the file": offsets("hidden_states", 0, 2**40),
    "offsets in reverse": offsets("hidden_states", 80, 0),
    "negative offsets": offsets("hidden_states", -80, 0),
    "offsets of 64 bits": offsets("hidden_states", 2**64 - 80, 2**64 - 1),
    "overlapping tensors": offsets("lengths", 0, 16),
    "a shape larger than its bytes": shape("hidden_states", 2**40, WIDTH),
    "a shape that overflows": shape("hidden_states", 2**62, 2**62),
    "a negative shape": shape("hidden_states", -5, WIDTH),
    "a type that does not exist": lambda header: header["hidden_states"].update(dtype="F33"),
    "a tensor that is missing": lambda header: header.pop("lengths"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_refused(shard: Path, name: str) -> None:
    rewrite(shard, HEADERS[name])
    with pytest.raises(UserError, match="is damaged"):
        open_it(shard)


@pytest.mark.parametrize("length", [0, 1, 2**27, 2**40, 2**63, 2**64 - 1])
def test_headers_that_lie_about_their_length_are_refused(shard: Path, length: int) -> None:
    rewrite(shard, nothing, header_length=length)
    with pytest.raises(UserError, match="is damaged"):
        open_it(shard)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b'{"a":' * 5000, b"\xff" * 64])
def test_headers_that_are_no_header_are_refused(shard: Path, text: bytes) -> None:
    shard.write_bytes(struct.pack("<Q", len(text)) + text)
    sign(shard)
    with pytest.raises(UserError, match="is damaged"):
        open_it(shard)


def store(tensors: Tensors, name: str, value: Any) -> None:
    tensors[name] = torch.as_tensor(value)


CONTENTS: dict[str, Callable[[Tensors], None]] = {
    "lengths that add up to more": lambda tensors: store(tensors, "lengths", [3, 2000]),
    "lengths that add up to less": lambda tensors: store(tensors, "lengths", [1, 2]),
    "a negative length": lambda tensors: store(tensors, "lengths", [7, -2]),
    "lengths that overflow": lambda tensors: store(tensors, "lengths", [2**62, 2**62]),
    "too few lengths": lambda tensors: store(tensors, "lengths", [5]),
    "lengths that are no integers": lambda tensors: store(tensors, "lengths", [3.0, 2.0]),
    "lengths in a square": lambda tensors: store(tensors, "lengths", [[3], [2]]),
    "checksums missing": lambda tensors: store(tensors, "checksums", torch.zeros(1, dtype=torch.int64)),
    "prompts too short": lambda tensors: store(tensors, "prompts", tensors["prompts"][:, :4].contiguous()),
    "prompts missing": lambda tensors: store(tensors, "prompts", tensors["prompts"][:1].contiguous()),
    "prompts of another type": lambda tensors: store(tensors, "prompts", tensors["prompts"].to(torch.int32)),
    "spans missing": lambda tensors: store(tensors, "spans", tensors["spans"][:4].contiguous()),
    "ids missing": lambda tensors: store(tensors, "response_ids", tensors["response_ids"][:4].contiguous()),
    "ids of another type": lambda tensors: store(tensors, "response_ids", tensors["response_ids"].to(torch.int16)),
    "states missing": lambda tensors: store(tensors, "hidden_states", tensors["hidden_states"][:4].contiguous()),
    "states too wide": lambda tensors: store(tensors, "hidden_states", torch.zeros(5, WIDTH + 1)),
    "states without a width": lambda tensors: store(tensors, "hidden_states", torch.zeros(5 * WIDTH)),
    "states of another type": lambda tensors: store(tensors, "hidden_states", torch.zeros(5, WIDTH).to(torch.int32)),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_do_not_fit_are_refused(shard: Path, name: str) -> None:
    """The file is whole and every checksum right; only what it says is wrong."""
    tensors = load_file(shard)
    CONTENTS[name](tensors)
    save_file(tensors, shard)
    sign(shard)
    with pytest.raises(UserError, match="is damaged"):
        open_it(shard)


def test_a_forged_shard_that_fits_is_read(shard: Path) -> None:
    """So the refusals above are for what they say: signing itself is right."""
    tensors = load_file(shard)
    save_file(tensors, shard)
    sign(shard)
    assert len(open_it(shard)) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"rows": "two"}', "null", '{"rows": 2, "rows": 3}', "\x00"])
@pytest.mark.parametrize("which", ["facts", "key"])
def test_json_files_that_are_something_else_are_refused(shard: Path, which: str, text: str) -> None:
    (shard.with_suffix(".json") if which == "facts" else shard.parent / CACHE_FILE).write_text(text)
    with pytest.raises(UserError, match=r"damaged|stale"):
        open_it(shard)


def test_facts_of_another_type_are_refused(shard: Path) -> None:
    path = shard.with_suffix(".json")
    facts = json.loads(path.read_text())
    for name, value in facts.items():
        for other in (str(value), [value], None, {}, value + 0.5, True):
            path.write_text(json.dumps(facts | {name: other}))
            with pytest.raises(UserError, match="damaged"):
                open_it(shard)


# --- arrays in the user's cache folder -------------------------------------------------------------------------------


def entry(header: bytes, data: bytes = b"") -> bytes:
    """A ``.npy`` member with a header of our own."""
    text = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    return npy.magic(1, 0) + struct.pack("<H", len(text)) + text + data


def archive(member: bytes, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("values.npy", member)
    return buffer.getvalue()


def damaged_deflate() -> bytes:
    content = archive(entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (64,)}", bytes(512)), compression=8)
    middle = content.index(b"values.npy") + 20
    return content[:middle] + bytes(byte ^ 0x5A for byte in content[middle : middle + 20]) + content[middle + 20 :]


def encrypted() -> bytes:
    content = bytearray(archive(entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (0,)}")))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + place] |= 1
    return bytes(content)


def other_method() -> bytes:
    content = bytearray(archive(entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (0,)}")))
    for signature, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(signature) + place] = 99
    return bytes(content)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a pickle": lambda: archive(entry(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n.")),
    "a shape beyond the file": lambda: archive(entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (99,)}")),
    "a shape beyond the memory": lambda: archive(
        entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (2305843009213693951,)}")
    ),
    "a shape that overflows": lambda: archive(
        entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807)}")
    ),
    "a negative shape": lambda: archive(entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}")),
    "code for a header": lambda: archive(entry(b"__import__('os').abort()")),
    "a header that does not close": lambda: archive(entry(b"{'descr': ('<i8")),
    "a deep header": lambda: archive(entry(b"(" * 60_000)),
    "an unknown type": lambda: archive(entry(b"{'descr': '<i9', 'fortran_order': False, 'shape': (1,)}")),
    "damaged compression": damaged_deflate,
    "an encrypted member": encrypted,
    "an unknown compression": other_method,
    "an empty file": lambda: b"",
    "no archive": lambda: b"PK\x03\x04" + bytes(100),
    "a single array": lambda: entry(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}", bytes(8)),
    "a bare pickle": lambda: b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_arrays_that_lie_are_computed_anew(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vocabulary_cache.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "entry.npz").write_bytes(ARCHIVES[name]())
    truth = {"values": np.arange(3)}
    found = vocabulary_cache.cached("entry", lambda: truth)
    assert found["values"].tolist() == [0, 1, 2]
    again = vocabulary_cache.cached("entry", lambda: pytest.fail("the mended file was not read"))
    assert again["values"].tolist() == [0, 1, 2]
