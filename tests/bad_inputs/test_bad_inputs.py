"""Every bad input ends in exit status 2 and a sentence with place, mistake and mend, and leaves nothing behind."""

from __future__ import annotations

import pytest

from bad_inputs.cases import BadInput
from bad_inputs.conftest import Workplaces
from bad_inputs.table import BAD_INPUTS
from bad_inputs.workplace import contents

CASES = [pytest.param(case, id=f"{kind}: {case.name}") for kind, cases in BAD_INPUTS.items() for case in cases]


def test_the_good_recipe_succeeds(workplaces: Workplaces) -> None:
    assert workplaces.first.code == 0, workplaces.first.output


def test_the_table_is_large_and_its_names_are_distinct() -> None:
    assert len(CASES) >= 60
    for cases in BAD_INPUTS.values():
        assert len({case.name for case in cases}) == len(cases) > 0


@pytest.mark.parametrize("case", CASES)
def test_bad_input(workplaces: Workplaces, case: BadInput) -> None:
    folder = workplaces.fresh(has_run=case.has_run)
    case.spoil(folder)
    before = contents(folder)
    ended = workplaces.start(case.command)
    assert "Traceback" not in ended.output, ended.output
    assert ended.code == 2, ended.output
    sentences = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert 1 <= len(sentences) <= case.num_sentences, ended.errors
    position = 0
    for fragment in case.says:
        position = sentences[0].find(fragment, position)
        assert position >= 0, f"{fragment!r} is not in its place in: {sentences[0]}"
        position += len(fragment)
    assert sentences[0].isprintable()
    assert contents(folder) == before, "a refused command leaves everything as it was"
