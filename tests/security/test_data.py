"""Text is text: a row that names a file, an address or a command leads nowhere."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from vocabridge.errors import UserError
from vocabridge.pairs import PairTokenizer, tokenize_examples
from vocabridge.text import read_examples

ADDRESS = "http://canary.invalid/rows.jsonl"


def names(secret: Path) -> list[str]:
    """Texts that mean a file or an address to some program."""
    return [
        str(secret),
        f"{secret}:train",
        secret.as_uri(),
        f"@{secret}",
        f"!include {secret}",
        f"{{{{ include('{secret}') }}}}",
        f"{{% include '{secret}' %}}",
        f"$(cat {secret})",
        f"`cat {secret}`",
        f"| cat {secret}",
        f"../outside/{secret.name}",
        ADDRESS,
        "s3://canary.invalid/rows",
        "hf://datasets/canary/rows",
        f'<img src="{ADDRESS}">',
        f"![x]({ADDRESS})",
    ]


def rows(secret: Path) -> list[dict[str, Any]]:
    """Each of these texts in each place of a row."""
    found: list[dict[str, Any]] = []
    for name in names(secret):
        found += [
            {"prompt": name, "response": name},
            {"instruction": name, "input": name, "output": [name, name]},
            {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": name}]},
            {"prompt": "x", "response": "y", "data": name, "path": name, "image": name, "file_name": name},
        ]
    return found


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_the_witness_sees(secret: Path, witness: Any) -> None:
    secret.read_text()
    os.listdir(secret.parent)
    assert len(witness.saw("canary.jsonl")) == 1
    assert witness.saw("os.listdir")


def test_no_text_of_a_row_is_opened(
    tmp_path: Path,
    secret: Path,
    witness: Any,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = write(tmp_path / "data" / "train.jsonl", rows(secret))
    witness.begin()
    examples = read_examples(path)
    assert len(examples) == 4 * len(names(secret))
    assert examples[0].response == str(secret)
    student = copy.deepcopy(tiny_bpe_tokenizer)
    student.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for template in ("plain", "chat"):
        pair = PairTokenizer(student, tiny_sentencepiece_tokenizer, student_template=template, max_length=1024)
        assert len(tokenize_examples(examples, pair)) == len(examples)
    assert witness.saw("train.jsonl"), "it looked"
    assert witness.saw("canary") == []
    assert witness.saw("outside") == []
    assert witness.saw("socket.") == []


@pytest.mark.parametrize("kind", ["string", "list", "key"])
def test_a_line_that_names_another_file_is_no_row(tmp_path: Path, secret: Path, witness: Any, kind: str) -> None:
    line = {"string": str(secret), "list": [str(secret)], "key": {str(secret): str(secret)}}[kind]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line) + "\n")
    witness.begin()
    with pytest.raises(UserError, match=r"train\.jsonl:1"):
        read_examples(path)
    assert witness.saw("outside") == []


def test_rows_given_as_strings_are_names_only_when_all_are(secret: Path, witness: Any) -> None:
    """A list of names is a list of sources, by the caller's own hand; rows from a file can never become one."""
    witness.begin()
    with pytest.raises(UserError, match="must be an object"):
        read_examples([{"prompt": "x", "response": "y"}, str(secret)])
    assert witness.saw("canary") == []


def test_a_saved_dataset_does_not_lead_to_files_that_its_rows_name(tmp_path: Path, secret: Path, witness: Any) -> None:
    """An image column holds paths, which the library would open to decode them."""
    content = {"prompt": ["x"], "response": ["y"], "image": [{"bytes": None, "path": str(secret)}]}
    features = {"prompt": datasets.Value("string"), "response": datasets.Value("string"), "image": datasets.Image()}
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    witness.begin()
    (example,) = read_examples(tmp_path / "saved")
    assert (example.prompt, example.response) == ("x", "y")
    assert witness.saw("canary") == []


def test_an_image_is_no_prompt(tmp_path: Path, secret: Path, witness: Any) -> None:
    content = {"prompt": [{"bytes": None, "path": str(secret)}], "response": ["y"]}
    features = {"prompt": datasets.Image(), "response": datasets.Value("string")}
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    witness.begin()
    with pytest.raises(UserError, match=r"the column 'prompt' holds no text \(Image\)"):
        read_examples(tmp_path / "saved")
    assert witness.saw("canary") == []


@pytest.mark.parametrize("written", ["absolute", "upwards", "address"])
def test_a_dataset_folder_does_not_lead_out_of_itself(
    tmp_path: Path, secret: Path, witness: Any, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card of a folder may name its files; one that names others is refused."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    write(folder / "train.jsonl", [{"prompt": "x", "response": "y"}])
    named = {"absolute": str(secret), "upwards": "../outside/canary.jsonl", "address": ADDRESS}
    card = {"configs": [{"config_name": "default", "data_files": named[written]}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    witness.begin()
    with pytest.raises(UserError, match="cannot load it" if written == "address" else "outside of it"):
        read_examples(folder)
    assert witness.saw("open '" + str(secret)) == []
    assert witness.saw("socket.") == []


def test_a_dataset_folder_may_name_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    write(folder / "a" / "one.jsonl", [{"prompt": "x", "response": "y"}])
    write(folder / "b" / "two.jsonl", [{"prompt": "z", "response": "z"}])
    files = [{"split": "train", "path": "a/*.jsonl"}, {"split": "test", "path": ["b/two.jsonl"]}]
    card = {"configs": [{"config_name": "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    (example,) = read_examples(f"{folder}:train")
    assert example.response == "y"
