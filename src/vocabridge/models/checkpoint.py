"""Where a checkpoint lies: hub, folder or GGUF file; what can be refused by looking at the files alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from vocabridge.errors import UserError
from vocabridge.suggest import did_you_mean

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as ``from_pretrained`` takes it."""

    name: str
    """Hub id or folder."""
    gguf_file: str | None
    """File name inside the folder, when the checkpoint is a GGUF file."""
    is_local: bool
    """It lies on this machine, so nothing is to be asked of the hub."""

    @property
    def path(self) -> str:
        """What the user wrote, in full."""
        return str(Path(self.name) / self.gguf_file) if self.gguf_file else self.name


def find_checkpoint(name: str) -> Checkpoint:
    """Tell a hub id, a folder and a GGUF file apart.

    Raises:
        UserError: a folder or file that does not exist, or something that is neither.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_checkpoint(path)
    if path.is_dir():
        return Checkpoint(str(path), None, is_local=True)
    if path.exists():
        raise UserError(f"'{name}' is a file; give the folder with config.json, or a file that ends in .gguf.")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UserError(f"folder '{name}' does not exist{_similar_sibling(path)}.")
    return Checkpoint(name, None, is_local=False)


def check_weight_files(checkpoint: Checkpoint) -> None:
    """Refuse a local folder that cannot be loaded, or only by unpickling.

    Raises:
        UserError: no config.json, no weights, weights in pickle files only, or an index that leads to such a file or
            out of the folder.
    """
    if not checkpoint.is_local or checkpoint.gguf_file is not None:
        return
    folder = Path(checkpoint.name)
    if not (folder / "config.json").is_file():
        raise UserError(f"folder '{folder}' has no config.json, so it is not a checkpoint{_gguf_hint(folder)}.")
    if (index := folder / "model.safetensors.index.json").is_file() and not (folder / "model.safetensors").is_file():
        _check_index(index)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise _pickled(folder, pickles[0])
    raise UserError(f"folder '{folder}' has no model.safetensors{_gguf_hint(folder)}.")


def _check_index(index: Path) -> None:
    """The library reads whatever file an index names, pickles and files of other folders included."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = sorted(name for name in names if PurePath(name).name != name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({error}); save or download the model again.") from error
    if outside:
        raise UserError(f"{index} names '{outside[0]}', which lies outside of its folder; download the model again.")
    if pickles := sorted(name for name in names if not name.endswith(".safetensors")):
        raise _pickled(index.parent, pickles[0])


def _pickled(folder: Path, name: str) -> UserError:
    return UserError(
        f"folder '{folder}' holds its weights as a pickle ({name}), which can run any code when it is read; "
        "save the model again as safetensors (model.save_pretrained)."
    )


def _gguf_checkpoint(path: Path) -> Checkpoint:
    if not path.is_file():
        raise UserError(f"GGUF file '{path}' does not exist{_similar_sibling(path)}.")
    return Checkpoint(str(path.parent), path.name, is_local=True)


def _similar_sibling(path: Path) -> str:
    siblings = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, siblings)


def _gguf_hint(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    return f"; to load the GGUF file in it, give '{files[0]}'" if files else ""
