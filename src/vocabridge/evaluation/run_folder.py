"""The folder of an evaluation: predictions as they come, a manifest that guards them, results written in one piece.

::

    manifest.json                   what the files beside it were made from: model, settings, data
    predictions/NAME.seed10.jsonl   one line an example, in the order of the file
    bits/NAME.json                  bits of the reference responses
    bits/NAME.jsonl                 the same row by row, in the order of the file; not there in older folders
    results.json

While a file is being generated its lines go to ``NAME.seed10.jsonl.partial`` in the order of the batches. After a kill
whole lines are kept, the torn one is dropped, and the missing examples are generated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vocabridge.durable import open_to_append, write_in_one_piece
from vocabridge.errors import UserError, one_line

_MANIFEST = "manifest.json"
_RESULTS = "results.json"
_PREDICTIONS = "predictions"
_BITS = "bits"

Record = dict[str, Any]
Overwrite = bool | Literal["other model"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What predictions depend on.

    Attributes:
        model: fingerprint of the model's weights and configuration and of its tokenizer.
        settings: every setting that changes a prediction, by name.
        data: fingerprint of the examples, by file name.
    """

    model: str
    settings: Mapping[str, Any]
    data: Mapping[str, str]

    def differences(self, other: Manifest) -> list[str]:
        """What makes the other's predictions unusable here, in words; a new data file is no difference."""
        found = [] if self.model == other.model else ["the model"]
        for name in sorted(self.settings.keys() | other.settings.keys()):
            old, new = self.settings.get(name), other.settings.get(name)
            if old != new:
                found.append(f"{name} ({old} there, {new} now)")
        found += [
            f"the data of '{name}'" for name in self.data if other.data.get(name, self.data[name]) != self.data[name]
        ]
        return found


class RunFolder:
    """The files of one evaluation of one model."""

    def __init__(self, path: Path, manifest: Manifest, *, overwrite: Overwrite = False) -> None:
        """Open or create the folder.

        Args:
            path: the folder; made if missing.
            manifest: what this evaluation depends on.
            overwrite: remove the files of an earlier evaluation first, and only those; ``"other model"``: if it was of
                another model.

        Raises:
            UserError: the folder holds something else, or an evaluation of another model, setting or data.
        """
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; the evaluation needs a folder to write to.")
        if overwrite is True:
            self._clear()
        elif path.exists() and any(file.name != f"{_MANIFEST}.tmp" for file in path.iterdir()):
            manifest = self._merged(manifest, replaces_model=overwrite == "other model")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise UserError(f"{path} cannot be made ({error.strerror}); name another folder.") from error
        text = json.dumps({"model": manifest.model, "settings": dict(manifest.settings), "data": dict(manifest.data)})
        write_in_one_piece(path / _MANIFEST, text + "\n")
        for name in (_PREDICTIONS, _BITS):
            (path / name).mkdir(exist_ok=True)

    def _clear(self) -> None:
        """The manifest goes last and comes first, so that whatever a kill leaves is still known by it."""
        (self.path / _RESULTS).unlink(missing_ok=True)
        for name in (_PREDICTIONS, _BITS):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / _MANIFEST).unlink(missing_ok=True)

    def _merged(self, manifest: Manifest, *, replaces_model: bool) -> Manifest:
        path = self.path / _MANIFEST
        if not path.exists():
            raise UserError(f"{self.path} is not empty and holds no evaluation; give another folder, or --overwrite.")
        try:
            found = Manifest(**json.loads(path.read_text("utf-8")))
            if not (isinstance(found.settings, dict) and isinstance(found.data, dict)):
                raise TypeError("settings and data must be objects")
        except (ValueError, TypeError, RecursionError) as error:
            raise damaged(path, error) from error
        if replaces_model and found.model != manifest.model:
            self._clear()
            return manifest
        if differences := found.differences(manifest):
            raise UserError(
                f"{self.path} holds an evaluation that differs in {', '.join(differences)}; "
                "give another folder, or --overwrite to discard it."
            )
        return Manifest(manifest.model, manifest.settings, {**found.data, **manifest.data})

    def predictions(self, name: str, seed: int) -> PredictionFile:
        """The predictions for one data file under one seed."""
        return PredictionFile(self.path / _PREDICTIONS / f"{name}.seed{seed}.jsonl")

    def bits_path(self, name: str) -> Path:
        """The file with the bits of a data file."""
        return self.path / _BITS / f"{name}.json"

    def load_bits(self, name: str) -> dict[str, Any] | None:
        """What ``save_bits`` wrote for a data file, or None."""
        path = self.bits_path(name)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text("utf-8"))
            if not (isinstance(found, dict) and all(isinstance(value, int | float) for value in found.values())):
                raise TypeError("it must hold numbers by name")
        except (ValueError, TypeError, RecursionError) as error:
            raise damaged(path, error) from error
        return found

    def save_bits(self, name: str, bits: Mapping[str, Any], *, rows: Iterable[Record]) -> None:
        """Keep the bits of a data file, the sums last, so that they are never there without the rows."""
        write_in_one_piece(self.path / _BITS / f"{name}.jsonl", "".join(map(_line, rows)))
        write_in_one_piece(self.bits_path(name), json.dumps(bits) + "\n")

    def save_results(self, text: str) -> None:
        """Write results.json."""
        write_in_one_piece(self.path / _RESULTS, text)


class PredictionFile:
    """Predictions for one data file under one seed; each record has the ``index`` of its example."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial_path = path.with_name(path.name + ".partial")

    def load(self) -> dict[int, Record]:
        """The records written so far, by index; a line that a kill tore is cut off the file."""
        if self.path.exists():
            lines = map(_parsed, self.path.read_bytes().splitlines(keepends=True))
            return {record["index"]: record for record in lines if record is not None}
        if self.partial_path.is_symlink():  # whatever it leads to is not ours to cut
            self.partial_path.unlink()
        if not self.partial_path.exists():
            return {}
        records: dict[int, Record] = {}
        kept_bytes = 0
        with self.partial_path.open("rb+") as file:
            for line in file:
                record = _parsed(line)
                if record is None:
                    break
                records[record["index"]] = record
                kept_bytes += len(line)
            file.truncate(kept_bytes)
        return records

    def append(self, records: Iterable[Record]) -> None:
        """Add complete lines and hand them to the disk."""
        with open_to_append(self.partial_path) as file:
            file.writelines(_line(record).encode() for record in records)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, records: Mapping[int, Record]) -> None:
        """Replace the partial file by the final one, in the order of the examples."""
        write_in_one_piece(self.path, "".join(_line(records[index]) for index in sorted(records)))
        self.partial_path.unlink(missing_ok=True)


def damaged(path: Path, error: Exception) -> UserError:
    """What to say of a file of an earlier evaluation that does not hold what it should."""
    return UserError(f"{path} is damaged ({one_line(error)}); run again with --overwrite.")


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and type(record.get("index")) is int
    return record if line.endswith(b"\n") and is_record else None
