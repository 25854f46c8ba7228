"""``training.push_to_hub``: the finished student goes to the hub, once and whole, and nothing that only a run needs."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainingArguments

from vocabridge.errors import UserError, one_line

_SUFFIXES = frozenset((".safetensors", ".json", ".jsonl", ".yaml", ".md", ".jinja", ".txt", ".model", ".py"))
"""Of weights, configuration, tokenizer, card, recipe and records; no pickle is called so."""
_FOLDERS = (".", "adapter", "additional_chat_templates")
"""Not checkpoints, nor answers of an evaluation, which repeat its prompts."""

_NOT_FOR_OTHERS = ("checkpoint-*", "evaluation/*", "study*", "*.bin", "*.pt", ".*")
"""The same for who uploads a folder with a command that knows patterns to leave out."""


def upload_run(
    run_dir: Path,
    args: TrainingArguments,
    *,
    commit_message: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
) -> str:
    """Upload a finished run to ``hub_model_id``, which is made if it is not there; returns the commit's address.

    Args:
        run_dir: the run folder or one like it, to which nobody writes meanwhile.
        args: ``hub_model_id`` (default: the name of ``output_dir``) and defaults of the following.
        commit_message: of the commit.
        token: default: that of the environment or of ``hf auth login``.
        revision: branch of the commit.
        private: whether a repository that has to be made is private.

    Raises:
        UserError: the hub cannot be reached or refuses it; the run folder is whole.
    """
    repository = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    hub = HfApi(library_name="vocabridge")
    try:
        private = args.hub_private_repo if private is None else private
        repository = hub.create_repo(repository, token=token, private=private, exist_ok=True).repo_id
        commit = hub.upload_folder(
            repo_id=repository,
            folder_path=run_dir,
            allow_patterns=[glob.escape(name) for name in files_to_upload(run_dir)],
            commit_message=commit_message or "End of training",
            token=token,
            revision=revision or args.hub_revision,
        )
    except Exception as error:  # the hub's client raises what its network library raises
        command = shlex.join(_by_hand(repository, run_dir, revision or args.hub_revision, is_private=bool(private)))
        raise UserError(
            f"{run_dir}: the run is finished and whole in its folder, but was not uploaded ({one_line(error)}); do it "
            f"by hand: {command}"
        ) from error
    return commit.commit_url


def _by_hand(repository: str, run_dir: Path, revision: str | None, *, is_private: bool) -> list[str]:
    """A command that uploads what a run folder has for others; it cannot leave out links."""
    excluded = [word for pattern in _NOT_FOR_OTHERS for word in ("--exclude", pattern)]
    branch = ["--revision", revision] if revision else []
    return ["hf", "upload", repository, str(run_dir), ".", *excluded, *branch, *(["--private"] if is_private else [])]


def files_to_upload(run_dir: Path) -> list[str]:
    """What others need of a run folder, by names relative to it; of links nothing."""
    return sorted(path.relative_to(run_dir).as_posix() for folder in _FOLDERS for path in _own_files(run_dir / folder))


def _own_files(folder: Path) -> Iterator[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink() and path.suffix in _SUFFIXES and not path.name.startswith("."):
            yield path
