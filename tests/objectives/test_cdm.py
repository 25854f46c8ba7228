"""Contextual dynamic mapping against loops in float64, and the published defects that it must not have."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import tokenizer_zoo
from random_sides import random_sides
from tiny_pair import ROWS
from vocabridge.objectives._label_paths import LabelPaths
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.cdm import Cdm, Config, entropy_weights, path_groups
from warping_oracle import edit_distance, table_path, texts

BOTH_WAYS = [("byte_level_bpe", "sentencepiece_bpe"), ("sentencepiece_bpe", "byte_level_bpe")]


class World:
    """Random hidden states of both sides for the rows of the tiny pair, and the objective over them."""

    def __init__(self, names, **settings):
        self.tokenizers = [getattr(tokenizer_zoo, name)() for name in names]
        made = random_sides(*self.tokenizers)
        self.batch, self.setup, self.leaves = made.batch, made.setup, made.leaves
        self.sides = [made.forward.student, made.forward.teacher]
        self.objective = Cdm(Config(**settings), self.setup)

    def term(self):
        return self.objective(ForwardPair(*self.sides), self.batch)["cdm"]


def plain_logits(side):
    return side.hidden_states @ side.head.weight.T + side.head.bias


def positions_of(side, row):
    return [i for i, found in enumerate(side.rows.tolist()) if found == row]


def weights_by_loops(logits):
    probs = logits.detach().softmax(-1)
    entropies = [-sum(p * math.log(p) for p in row) for row in probs.tolist()]
    low, high = min(entropies), max(entropies)
    scaled = [(h - low) / (high - low) if high > low else 0.0 for h in entropies]
    return [int(3 / (1 + math.exp(-(4 * u - 2))) + 3) for u in scaled]


def warped_groups(world, logits):
    """Sets of student and teacher positions, from costs by loops; the teacher's sequence comes first."""
    spelling = [[(text or "").replace(" ", "") for text in texts(one)] for one in world.tokenizers]
    groups = []
    for row in range(len(ROWS)):
        mine, theirs = (positions_of(side, row) for side in world.sides)
        my_weights, their_weights = weights_by_loops(logits[0][mine]), weights_by_loops(logits[1][theirs])
        costs = [
            [
                edit_distance(spelling[1][world.sides[1].labels[j]], spelling[0][world.sides[0].labels[i]])
                * their_weights[b]
                * my_weights[a]
                for a, i in enumerate(mine)
            ]
            for b, j in enumerate(theirs)
        ]
        partners = {i: [] for i in mine}
        for b, a in table_path(costs):
            partners[mine[a]].append(theirs[b])
        by_partners = {}
        for i, found in partners.items():
            by_partners.setdefault(tuple(found), []).append(i)
        groups += [(students, list(teachers)) for teachers, students in by_partners.items()]
    return groups


def chunk_groups(world, logits):
    groups = []
    for row in range(len(ROWS)):
        sides = [
            (positions_of(side, row), world.batch[f"{prefix}chunk_ids"][row].tolist())
            for side, prefix in zip(world.sides, ("", "teacher_"), strict=True)
        ]
        for chunk in sorted(set(sides[0][1]) - {-1}):
            groups.append(tuple([i for i, c in zip(*side, strict=False) if c == chunk] for side in sides))
    return groups


def expected(world, groups, logits, *, kd_weight, temperature, top_k):
    """From the formula; the token pairs themselves are tested with the map."""
    labels = world.sides[0].labels
    total = -(1 - kd_weight) * logits[0].log_softmax(-1)[range(len(labels)), labels].sum()
    divergence = 0
    for students, teachers in groups:
        mine, theirs = logits[0][students].mean(0), logits[1][teachers].mean(0)
        tops = [side.detach().sort(descending=True).indices[:top_k].numpy()[None] for side in (mine, theirs)]
        found = world.objective._map.pairs(*tops)
        s, t = found.student_ids[0], found.teacher_ids[0]
        if len(s):
            q, log_p = (theirs[t] / temperature).softmax(0), (mine[s] / temperature).log_softmax(0)
            divergence = divergence + (q * (q.log() - log_p)).sum()
    return total + kd_weight * divergence


@pytest.mark.parametrize("names", BOTH_WAYS)
@pytest.mark.parametrize(("alignment", "find"), [("dtw", warped_groups), ("chunks", chunk_groups)])
def test_loss_and_gradients_by_loops(names, alignment, find):
    world = World(names, alignment=alignment, kd_weight=0.4, temperature=1.3, top_k=11, max_distance=0.45)
    logits = [plain_logits(side) for side in world.sides]
    groups = find(world, logits)
    assert sum(len(mine) > 1 for mine, _ in groups) > 0
    assert sum(len(theirs) > 1 for _, theirs in groups) > 0
    term = world.term()
    assert float(term.metrics["divergence"].count) == len(groups)
    assert float(term.metrics["dynamic_pairs"].sum) > 5
    reference = expected(world, groups, logits, kd_weight=0.4, temperature=1.3, top_k=11)
    torch.testing.assert_close(term.sum, reference, rtol=1e-10, atol=0)
    actual, wanted = (torch.autograd.grad(3 * loss, world.leaves) for loss in (term.sum, reference))
    for mine, other in zip(actual, wanted, strict=True):
        assert float(other.abs().max()) > 0.1
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("alignment", ["dtw", "chunks"])
def test_equal_tokenizers_compare_the_likeliest_tokens_of_both(alignment):
    world = World(["byte_level_bpe", "byte_level_bpe"], alignment=alignment, kd_weight=1.0, temperature=2.0, top_k=9)
    mine, theirs = (plain_logits(side) for side in world.sides)
    term = world.term()
    count = len(world.sides[0].labels)
    assert float(term.metrics["divergence"].count) == count, "equal sequences pair one to one"
    assert float(term.metrics["coverage"].sum) == count
    known = set(np.flatnonzero(world.objective._map._teacher_of >= 0).tolist())
    total = 0
    for i in range(count):
        tops = {token for side in (mine, theirs) for token in side[i].topk(9).indices.tolist()}
        ids = sorted(tops & known)
        q, log_p = (theirs[i, ids] / 2.0).softmax(0), (mine[i, ids] / 2.0).log_softmax(0)
        total = total + (q * (q.log() - log_p)).sum()
    torch.testing.assert_close(term.sum, total)


@pytest.mark.parametrize("alignment", ["dtw", "chunks"])
def test_agreeing_models_have_no_loss_and_no_gradient(alignment):
    """At any temperature: published, it acts on one side only, so that agreement is not the minimum."""
    world = World(["byte_level_bpe", "byte_level_bpe"], alignment=alignment, kd_weight=1.0, temperature=0.8)
    world.sides[1] = world.sides[0]
    term = world.term()
    assert float(term.metrics["token_pairs"].sum) > 50 * len(world.sides[0].labels)
    assert float(term.sum.detach()) == pytest.approx(0, abs=1e-11)
    for gradient in torch.autograd.grad(term.sum, world.leaves):
        assert float(gradient.abs().max()) < 1e-11


def test_the_teacher_teaches_in_every_column():
    """In the released code half of the columns have teacher and student swapped and pull the student away."""
    world = World(["byte_level_bpe", "byte_level_bpe"], alignment="chunks", kd_weight=1.0, temperature=1.0, top_k=7)
    mine, theirs = (plain_logits(side).detach() for side in world.sides)
    # One step along the negative gradient of the logits, taken on a head that is the identity.
    student = dataclasses.replace(
        world.sides[0],
        hidden_states=mine.clone().requires_grad_(True),
        head=dataclasses.replace(world.sides[0].head, weight=torch.eye(mine.shape[1], dtype=mine.dtype), bias=None),
    )
    world.sides[0] = student
    (gradient,) = torch.autograd.grad(world.term().sum, student.hidden_states)
    moved = 0
    for i in range(len(mine)):
        ids = gradient[i].nonzero().squeeze(1)
        direction = -(theirs[i, ids].softmax(0) - mine[i, ids].softmax(0))
        torch.testing.assert_close(gradient[i, ids], direction)
        only_student = set(mine[i].topk(7).indices.tolist()) - set(theirs[i].topk(7).indices.tolist())
        moved += len(only_student & set(ids.tolist()))
    assert moved > 100


def test_entropy_weights_by_loops():
    entropies = torch.tensor([0.1, 2.0, 1.1, 0.7, 3.0, 3.0, 0.4], dtype=torch.float64)
    rows = torch.tensor([0, 0, 0, 0, 2, 2, 3])
    weights = entropy_weights(entropies, rows, 5).tolist()
    assert weights == [3, 5, 4, 3, 3, 3, 3]


def test_groups_of_a_path():
    # Student 0 with teachers 0 and 1; students 1 and 2 with teacher 1; student 3 with teachers 2 to 4; 5 in none.
    paths = LabelPaths(np.array([0, 0, 1, 2, 3, 3, 3]), np.array([0, 1, 1, 1, 2, 3, 4]))
    groups = path_groups(paths, num_positions=6, device=torch.device("cpu"))
    assert groups.count == 3
    assert groups.student.tolist() == [0, 1, 1, 2, -1, -1]
    assert groups.teacher_positions.tolist() == [0, 1, 1, 2, 3, 4]
    assert groups.teacher.tolist() == [0, 0, 1, 2, 2, 2]


def test_nothing_to_compare_gives_zero_with_a_gradient_path_and_a_warning(caplog):
    world = World(BOTH_WAYS[0], kd_weight=1.0)
    for partners in (world.objective._map._teacher_of, world.objective._map._student_of):
        partners[:] = -1
    world.objective._map._max_distance = 0.0
    term = world.term()
    assert float(term.sum.detach()) == 0.0
    for gradient in torch.autograd.grad(term.sum, world.leaves):
        assert not gradient.any()
    assert "none of the" in caplog.text
