"""Minimum edit distance alignment against loops in float64, and the published defects that it must not have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tokenizer_zoo
from random_sides import random_sides
from tiny_pair import ROWS
from vocabridge.alignment import inverse_nearest_tokens, nearest_tokens, token_bytes
from vocabridge.losses.divergences import forward_kl
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.mined import Config, Mined
from warping_oracle import edit_distance, table_path, texts

GOLDEN = Path(__file__).parent.parent / "golden"


def tokenizers(names):
    return [getattr(tokenizer_zoo, name)() for name in names]


BOTH_WAYS = [("byte_level_bpe", "sentencepiece_bpe"), ("sentencepiece_bpe", "byte_level_bpe")]


class World:
    """Random hidden states of both sides for the rows of the tiny pair, and the objective over them."""

    def __init__(self, names, *, dtype=torch.float64, **settings):
        self.tokenizers = tokenizers(names)
        made = random_sides(*self.tokenizers)
        self.batch, self.setup = made.batch, made.setup
        self.sides = [self._cast(side, dtype) for side in (made.forward.student, made.forward.teacher)]
        self.objective = Mined(Config(**settings), self.setup)

    def _cast(self, side, dtype):
        weight, bias, hidden = (
            tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            for tensor in (side.head.weight, side.head.bias, side.hidden_states)
        )
        return dataclasses.replace(side, hidden_states=hidden, head=OutputHead(weight, bias, None, 1.0))

    def term(self):
        return self.objective(ForwardPair(*self.sides), self.batch)["mined"]

    def leaves(self):
        student = self.sides[0]
        return [student.hidden_states, student.head.weight, student.head.bias]


def plain_logits(side):
    return side.hidden_states @ side.head.weight.T + side.head.bias


def positions_of_rows(side):
    return [[i for i, row in enumerate(side.rows.tolist()) if row == wanted] for wanted in range(len(ROWS))]


def single_token_chunks(world):
    """Pairs whose chunk has one position on both sides, by loops."""
    student, teacher = (positions_of_rows(side) for side in world.sides)
    pairs = {}
    for row in range(len(ROWS)):
        mine = world.batch["chunk_ids"][row].tolist()
        theirs = world.batch["teacher_chunk_ids"][row].tolist()
        for chunk in set(mine) - {-1}:
            if mine.count(chunk) == theirs.count(chunk) == 1:
                pairs[student[row][mine.index(chunk)]] = teacher[row][theirs.index(chunk)]
    return pairs


def test_a_label_with_a_templates_space_is_not_taught_the_token_without_it():
    """One template puts a space before the answer: the chunk's bytes are the same, its tokens " In" and "In"."""
    world = World(BOTH_WAYS[0], kd_weight=1.0, temperature=1.0)
    pairs = single_token_chunks(world)
    student_bytes, teacher_bytes = (token_bytes(tokenizer) for tokenizer in world.tokenizers)
    labels, teacher_labels = (side.labels for side in world.sides)
    mine, bare = next(
        (i, teacher_bytes.index(piece[1:]))
        for i in pairs
        if (piece := student_bytes[labels[i]]) and piece[:1] == b" " and piece[1:] in teacher_bytes[3:]
    )
    assert student_bytes[labels[mine]] == teacher_bytes[teacher_labels[pairs[mine]]]
    teacher_labels[pairs.pop(mine)] = bare
    term = world.term()
    assert float(term.metrics["coverage"].sum) == len(pairs)
    torch.testing.assert_close(term.sum, expected(world, pairs, kd_weight=1.0, temperature=1.0))


def warped_pairs(world):
    """The published pairing, over labels: teacher first; ties go to the diagonal, then to the teacher's step."""
    spelling = [[(text or "").replace(" ", "") for text in texts(one)] for one in world.tokenizers]
    forward = nearest_tokens(world.tokenizers[1], world.tokenizers[0]).tolist()
    forward[world.tokenizers[1].eos_token_id] = world.tokenizers[0].eos_token_id
    pairs = {}
    for mine, theirs in zip(*(positions_of_rows(side) for side in world.sides), strict=True):
        student, teacher = (
            [int(side.labels[i]) for i in positions]
            for side, positions in zip(world.sides, (mine, theirs), strict=True)
        )
        partners = {i: [] for i in range(len(student))}
        costs = [[edit_distance(spelling[1][j], spelling[0][i]) for i in student] for j in teacher]
        for j, i in table_path(costs):
            partners[i].append(j)
        for i, found in partners.items():
            if len(found) == 1 and forward[teacher[found[0]]] == student[i]:
                pairs[mine[i]] = theirs[found[0]]
    return pairs


def expected(world, pairs, *, kd_weight, temperature):
    """Loops over positions and student tokens, from the formula."""
    student = world.sides[0]
    my_logits, their_logits = (plain_logits(side) for side in world.sides)
    sources = inverse_nearest_tokens(*world.tokenizers).tolist()
    ends = [tokenizer.eos_token_id for tokenizer in world.tokenizers]
    sources = [-1 if source == ends[1] else source for source in sources]
    sources[ends[0]] = ends[1]
    total = 0
    for i, label in enumerate(student.labels.tolist()):
        logits = my_logits[i]
        log_probs = (logits / temperature) - (logits / temperature).logsumexp(0)
        total = total - (1 - kd_weight) * (logits[label] - logits.logsumexp(0))
        if i not in pairs:
            total = total - kd_weight * log_probs[label]
            continue
        theirs = their_logits[pairs[i]] / temperature
        known = [v for v, source in enumerate(sources) if source >= 0]
        weights = torch.stack([theirs[sources[v]] for v in known]).softmax(0)
        total = total + kd_weight * (weights * (weights.log() - log_probs[known])).sum()
    return total


@pytest.mark.parametrize("names", BOTH_WAYS)
@pytest.mark.parametrize(("alignment", "find"), [("chunks", single_token_chunks), ("dtw", warped_pairs)])
def test_loss_and_gradients_by_loops(names, alignment, find):
    world = World(names, alignment=alignment, kd_weight=0.3, temperature=1.7)
    pairs = find(world)
    count = len(world.sides[0].labels)
    assert 20 < len(pairs) < count - 5
    term = world.term()
    assert float(term.metrics["coverage"].sum) == len(pairs)
    assert term.count == count
    reference = expected(world, pairs, kd_weight=0.3, temperature=1.7)
    torch.testing.assert_close(term.sum, reference, rtol=1e-10, atol=0)
    actual, wanted = (torch.autograd.grad(3 * loss, world.leaves()) for loss in (term.sum, reference))
    for mine, other in zip(actual, wanted, strict=True):
        assert float(other.abs().max()) > 0.1
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alignment", ["chunks", "dtw"])
def test_equal_tokenizers_are_plain_distillation(alignment):
    world = World(["byte_level_bpe", "byte_level_bpe"], alignment=alignment, kd_weight=1.0, temperature=2.0)
    student, _ = world.sides
    control = {*world.tokenizers[0].all_special_ids} - {world.tokenizers[0].eos_token_id}
    assert {i for i, known in enumerate(world.objective.has_source.tolist()) if not known} <= control
    logits = [plain_logits(side) for side in world.sides]
    missing = (~world.objective.has_source).nonzero().squeeze(1)
    theirs = logits[1].index_fill(1, missing, -torch.inf)
    torch.testing.assert_close(world.term().sum, forward_kl(logits[0], theirs, temperature=2.0).sum())
    assert float(world.term().metrics["coverage"].sum) == len(student.labels)


@pytest.mark.parametrize("alignment", ["chunks", "dtw"])
def test_agreeing_models_have_no_loss_and_no_gradient(alignment):
    world = World(["byte_level_bpe", "byte_level_bpe"], alignment=alignment, kd_weight=1.0)
    assert bool(world.objective.has_source[world.tokenizers[0].pad_token_id])
    world.sides[1] = world.sides[0]
    world.objective.has_source.fill_(True)  # control tokens without a role have none
    world.objective.sources.copy_(torch.arange(len(world.objective.sources)))
    term = world.term()
    assert float(term.metrics["coverage"].sum) == len(world.sides[0].labels)
    assert float(term.sum.detach()) == pytest.approx(0, abs=1e-12)
    for gradient in torch.autograd.grad(term.sum, world.leaves()):
        assert float(gradient.abs().max()) < 1e-12


def test_the_students_logits_are_not_overwritten():
    """In float32 the released code builds the teacher's rows in the student's memory: loss 0, wrong cross-entropy."""
    world = World(BOTH_WAYS[0], kd_weight=0.5, alignment="dtw", dtype=torch.float32)
    student, _ = world.sides
    before = student.hidden_states.detach().clone(), student.head.weight.detach().clone()
    term = world.term()
    logits = plain_logits(student)
    exact = torch.nn.functional.cross_entropy(logits, student.labels, reduction="sum").detach()
    torch.testing.assert_close(term.metrics["cross_entropy"].sum, exact)
    assert float(term.metrics["divergence"].sum) > 1
    assert torch.equal(before[0], student.hidden_states)
    assert torch.equal(before[1], student.head.weight)


def test_tokens_without_a_source_get_no_mass():
    """No -1e5: with a hot enough temperature the published constant would leak mass; here q is exactly 0 there."""
    world = World(BOTH_WAYS[0], kd_weight=1.0, temperature=1e6)
    assert single_token_chunks(world)
    missing = (~world.objective.has_source).nonzero().squeeze(1)
    assert len(missing) > 50
    (gradient,) = torch.autograd.grad(world.term().sum, world.sides[0].head.weight)
    # d/dz_v = (p_v - q_v) / T, with p_v = 1 / V at this temperature and q_v = 0, for paired and unpaired rows alike.
    hidden = world.sides[0].hidden_states
    is_label = torch.isin(missing, world.sides[0].labels)
    wanted = hidden.detach().sum(0) / len(world.objective.sources) / 1e6
    torch.testing.assert_close(gradient[missing[~is_label]], wanted.expand((~is_label).sum(), -1), rtol=1e-3, atol=0)


def test_published_rows():
    """The released code's rows on its own pairs and map (batch A, without its bug in float32): value and gradient.

    Its pairing over input tokens is not reproduced; its paths are, in tests/alignment/test_dtw.py.
    """
    tensors = load_file(GOLDEN / "case_mined_A.safetensors")
    published = json.loads((GOLDEN / "case_mined_A.json").read_text())
    hidden = tensors["in.student_hidden"].requires_grad_(True)
    objective = World(BOTH_WAYS[0], temperature=2.0).objective
    sources = torch.full((97,), -1)
    sources[tensors["out.stu2tea_student_ids"]] = tensors["out.stu2tea_teacher_ids"][:, 0]
    objective.sources, objective.has_source = sources.clamp(min=0), sources >= 0
    total, num_paired = 0.0, 0
    for row, path in enumerate(published["dtw"]):
        mine = (tensors["in.student_labels"][row] != -100).nonzero().squeeze(1).tolist()
        theirs = (tensors["in.teacher_labels"][row] != -100).nonzero().squeeze(1).tolist()
        for position, partners in zip(mine, path["student_to_teacher"], strict=True):
            logits = (hidden[row, position] @ tensors["in.student_lm_head_weight"].T)[None]
            labels = (tensors["in.student_labels"][row, position][None],)
            if tensors["out.one_hot_rows"][row, position]:
                losses, _ = objective._unpaired_rows((logits,), labels)
            else:
                teacher_logits = tensors["in.teacher_logits"][row, theirs[partners[0]]][None]
                losses, _ = objective._paired_rows((logits, teacher_logits), labels)
                num_paired += 1
            total = total + losses[1].sum()
    assert num_paired == 17
    torch.testing.assert_close(total.item(), published["scalars"]["kd_loss"], rtol=2e-5, atol=0)
    (gradient,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(gradient, tensors["grad.kd.student_hidden"], rtol=2e-4, atol=5e-6)


def test_end_tokens_pair_by_role_under_a_template_of_its_own():
    student, teacher = tokenizers(BOTH_WAYS[0])
    head = SimpleNamespace(weight=torch.zeros(len(token_bytes(student)), 1))
    setup = ObjectiveSetup(
        student_hidden_size=1,
        student_embedding=torch.nn.Embedding(1, 1),
        student_tokenizer=student,
        student_head=head,
        teacher_tokenizer=teacher,
        student_end_token_id=student.bos_token_id,
        teacher_end_token_id=teacher.eos_token_id,
    )
    sources = Mined(Config(), setup)
    assert sources.sources[student.bos_token_id] == teacher.eos_token_id
    known = sources.sources[sources.has_source].tolist()
    assert len(known) == len(set(known)), "a teacher token would be counted twice"
    assert not sources.has_source[student.eos_token_id]


@pytest.mark.parametrize("alignment", ["chunks", "dtw"])
def test_no_pair_leaves_cross_entropy_and_warns(alignment, caplog):
    world = World(BOTH_WAYS[0], alignment=alignment, kd_weight=0.5, temperature=1.0)
    world.batch["chunk_ids"] = torch.full_like(world.batch["chunk_ids"], -1)
    world.batch["teacher_chunk_ids"] = torch.full_like(world.batch["teacher_chunk_ids"], -1)
    if alignment == "dtw":
        world.objective.student_ids.fill_(-1)
    term = world.term()
    logits = plain_logits(world.sides[0])
    exact = torch.nn.functional.cross_entropy(logits, world.sides[0].labels, reduction="sum")
    torch.testing.assert_close(term.sum, exact)
    assert "none of the" in caplog.text
