"""One fork server, one good folder and one finished run for all cases; each case gets copies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bad_inputs.cases import DISTILL
from bad_inputs.workplace import write_workplace
from faults.starts import Ended, ForkServer


@dataclass(frozen=True, slots=True)
class Workplaces:
    """Where commands run: always the same folder, for a run folder names its data by absolute paths."""

    server: ForkServer
    good: Path
    place: Path
    finished: Path
    first: Ended
    """How the good recipe's own run ended."""

    def fresh(self, *, has_run: bool = False) -> Path:
        """A folder in which every command succeeds."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.good, self.place)
        if has_run:
            shutil.copytree(self.finished, self.place / "run")
        return self.place

    def start(self, command: tuple[str, ...]) -> Ended:
        return self.server.start(command, self.place)


@pytest.fixture(scope="session")
def workplaces(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Workplaces]:
    base = tmp_path_factory.mktemp("bad_inputs")
    server = ForkServer(base)
    write_workplace(base / "good", tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    shutil.copytree(base / "good", base / "workplace")
    first = server.start(DISTILL, base / "workplace")
    if first.code == 0:
        shutil.copytree(base / "workplace" / "run", base / "finished")
    yield Workplaces(server, base / "good", base / "workplace", base / "finished", first)
    server.close()
