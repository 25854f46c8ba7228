"""DSKD-CMA with the projectors and the discriminator of a golden case."""

from __future__ import annotations

import torch
from torch import nn

from vocabridge.objectives.base import ObjectiveSetup
from vocabridge.objectives.dskd_cma import Config, DskdCma

VALUE = {"rtol": 2e-5, "atol": 2e-6}
GRADIENT = {"rtol": 2e-4, "atol": 5e-6}
PUBLISHED = {"query_start": "random", "statistics": "batch", "matching": "none"}
DISCRIMINATOR = {"highway": "highway1", "linear": "linear1", "output": "linear2"}


def build(case, **settings):
    """The objective with the golden case's projectors."""
    objective = DskdCma(
        Config(**{**PUBLISHED, **settings}),
        ObjectiveSetup(
            student_hidden_size=case.tensors["in.student_hidden"].shape[-1],
            student_embedding=nn.Embedding(2, 2),
            student_tokenizer=None,
            student_head=None,
            teacher_hidden_size=case.tensors["in.teacher_hidden"].shape[-1],
            teacher_embedding=nn.Embedding(2, 2),
            teacher_tokenizer=None,
        ),
    )
    with torch.no_grad():
        for module, name in [
            (objective.query_projector, "query"),
            (objective.teacher_to_student, "t2s"),
            (objective.student_to_teacher, "s2t"),
        ]:
            module.weight.copy_(case.tensors[f"in.projector_{name}_weight"])
            module.bias.copy_(case.tensors[f"in.projector_{name}_bias"])
    return objective


def total(terms, student_tokens, teacher_tokens):
    divisor = {"student_tokens": student_tokens, "teacher_tokens": teacher_tokens}
    return sum(term.weight * term.sum / divisor[term.unit] for term in terms.values())


def published_matching(case, **gan):
    """The objective with the golden case's discriminator, without dropout as in the published numbers."""
    objective = build(case, matching="gan", matching_weight=1.0, gan={"hidden_size": 24, **gan})
    with torch.no_grad():
        for ours, published in DISCRIMINATOR.items():
            module = getattr(objective.matching.gan.discriminator, ours)
            module.weight.copy_(case.tensors[f"in.kq_{published}_weight"])
            module.bias.copy_(case.tensors[f"in.kq_{published}_bias"])
    return objective.eval()
