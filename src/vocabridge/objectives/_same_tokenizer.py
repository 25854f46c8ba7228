"""What objectives for one common tokenizer share: the check that it is one, and which positions pair.

The models may differ in prompt template and end token (a base teacher, a chat student) and in the padded rows of their
heads: 151,936 and 152,064 for the same 151,665 tokens.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from vocabridge.alignment import token_bytes
from vocabridge.errors import UserError
from vocabridge.models.forward import SideForward
from vocabridge.objectives._row_pairs import RowPairs, same_token_pairs
from vocabridge.objectives.base import ObjectiveSetup
from vocabridge.pairs import PairBatch


def check_same_tokenizer(objective: str, setup: ObjectiveSetup) -> int:
    """Check that every id that both vocabularies have stands for the same bytes; either may have further ids.

    Control tokens must have the same ids, not the same spellings: those are roles of a template.

    Returns:
        Number of ids that both have: the columns that their heads have in common.

    Raises:
        UserError: an id differs; names the first one and its two spellings.
    """
    student, teacher = setup.student_tokenizer, setup.teacher_tokenizer
    assert teacher is not None
    tables = token_bytes(student), token_bytes(teacher)
    common_size = min(map(len, tables))
    differing = next((token_id for token_id in range(common_size) if tables[0][token_id] != tables[1][token_id]), None)
    if differing is not None:
        raise UserError(
            f"objective {objective} needs a student and a teacher with the same tokenizer, but id {differing} is "
            f"{_spelling(student, differing)} for the student and {_spelling(teacher, differing)} for the teacher; "
            "use an objective for different tokenizers, such as shared_vocabulary or dskd_cma."
        )
    return common_size


def _spelling(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    data = token_bytes(tokenizer)[token_id]
    if data is None:
        token = tokenizer.convert_ids_to_tokens(token_id)
        return "unused" if token is None else f"the control token {token!r}"
    return repr(data.decode("utf-8", "backslashreplace"))


def same_tokenizer_pairs(student: SideForward, teacher: SideForward, batch: PairBatch) -> RowPairs:
    """Position pairs of two sides with the same tokenizer: all of them, unless the templates differ around a response.

    End tokens pair by role; a first token that got a template's space on one side only is left out.
    """
    return same_token_pairs(student, teacher, batch, student_keys=student.labels, teacher_keys=teacher.labels)
