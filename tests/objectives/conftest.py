import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair

GOLDEN = Path(__file__).parent.parent / "golden"
SIDES = ("student", "teacher")


class GoldenBatch:
    """Batch F of a golden case: every position of every row is supervised, so packing is flattening."""

    def __init__(self, name: str):
        self.tensors = load_file(GOLDEN / f"case_{name}.safetensors")
        self.scalars = json.loads((GOLDEN / f"case_{name}.json").read_text())["scalars"]

    def leaf(self, name: str) -> torch.Tensor:
        return self.tensors[f"in.{name}"].clone().requires_grad_(True)

    def side(self, side: str, hidden: torch.Tensor, weight: torch.Tensor) -> SideForward:
        labels = self.tensors[f"in.{side}_labels"]
        num_rows, length = labels.shape
        embedding = nn.Embedding.from_pretrained(self.tensors[f"in.{side}_embed_weight"])
        return SideForward(
            hidden_states=hidden.flatten(0, 1),
            input_ids=self.tensors[f"in.{side}_input_ids"].flatten(),
            labels=labels.flatten(),
            rows=torch.arange(num_rows).repeat_interleave(length),
            head=OutputHead(weight, None, None, 1.0),
            embedding=embedding,
        )

    def pair(self) -> SimpleNamespace:
        student_hidden, student_head = self.leaf("student_hidden"), self.leaf("student_lm_head_weight")
        teacher_hidden, teacher_head = self.tensors["in.teacher_hidden"], self.tensors["in.teacher_lm_head_weight"]
        return SimpleNamespace(
            forward=ForwardPair(
                self.side("student", student_hidden, student_head), self.side("teacher", teacher_hidden, teacher_head)
            ),
            student_hidden=student_hidden,
            student_head=student_head,
        )

    def batch(self) -> dict[str, torch.Tensor]:
        """Enough of a PairBatch for an objective; chunks play no role in these cases."""
        student, teacher = self.tensors["in.student_labels"], self.tensors["in.teacher_labels"]
        return {
            "input_ids": student,
            "chunk_ids": torch.zeros_like(student),
            "teacher_chunk_ids": torch.zeros_like(teacher),
        }

    def masked_pair(self) -> ForwardPair:
        """Of a case with prompts and padding: its supervised positions; hidden states play no role."""
        sides = []
        for side in SIDES:
            labels = self.tensors[f"in.{side}_labels"]
            rows, columns = (labels != -100).nonzero(as_tuple=True)
            weight = self.tensors[f"in.{side}_lm_head_weight"]
            sides.append(
                SideForward(
                    hidden_states=self.tensors[f"in.{side}_hidden"][rows, columns],
                    input_ids=self.tensors[f"in.{side}_input_ids"][rows, columns],
                    labels=labels[rows, columns],
                    rows=rows,
                    head=OutputHead(weight, None, None, 1.0),
                    embedding=nn.Embedding.from_pretrained(self.tensors[f"in.{side}_embed_weight"]),
                )
            )
        return ForwardPair(*sides)

    def masked_batch(self) -> dict[str, torch.Tensor]:
        """Labels as a PairBatch has them: not shifted."""
        student, teacher = (nn.functional.pad(self.tensors[f"in.{s}_labels"], (1, 0), value=-100) for s in SIDES)
        return {"labels": student, "teacher_labels": teacher}


@pytest.fixture
def golden():
    return GoldenBatch
