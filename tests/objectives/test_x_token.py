"""X-Token against loops over chunks, with the map as a dense matrix."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from chunk_cases import STUDENT_CHUNKS, TEACHER_CHUNKS, make_batch, make_side
from vocabridge.alignment import retokenized, token_bytes
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.x_token import Config, XToken, vocabulary_map


def make_setup(student_head, teacher_head, student_tokenizer, teacher_tokenizer, **options):
    return ObjectiveSetup(
        student_hidden_size=6,
        student_embedding=nn.Identity(),
        student_tokenizer=student_tokenizer,
        student_head=student_head,
        teacher_tokenizer=teacher_tokenizer,
        teacher_head=teacher_head,
        **options,
    )


class Case:
    """Random sides whose heads have the sizes of two tokenizers."""

    def __init__(self, student_tokenizer, teacher_tokenizer, *, chunks=(STUDENT_CHUNKS, TEACHER_CHUNKS)):
        self.student = make_side(len(student_tokenizer), chunks[0], seed=1, scale=1.0)
        self.teacher = make_side(len(teacher_tokenizer), chunks[1], seed=2, width=5, scale=1.0)
        self.setup = make_setup(self.student.head, self.teacher.head, student_tokenizer, teacher_tokenizer)
        self.batch = make_batch(*chunks)
        self.chunks = chunks

    def term(self, **settings):
        return XToken(Config(**settings), self.setup)(ForwardPair(self.student, self.teacher), self.batch)["x_token"]

    @property
    def leaves(self):
        return [self.student.hidden_states, self.student.head.weight, self.student.head.bias]

    def chunk_logits(self):
        """``(student [n, V_s], teacher [m, V_t])`` of every chunk."""
        own, theirs = self.student.head(self.student.hidden_states), self.teacher.head(self.teacher.hidden_states)
        first = [0, 0]
        for student_ids, teacher_ids in zip(*self.chunks, strict=True):
            for chunk in range(max([-1, *student_ids]) + 1):
                rows = [
                    [start + i for i, c in enumerate(ids) if c == chunk]
                    for start, ids in zip(first, (student_ids, teacher_ids), strict=True)
                ]
                yield own[rows[0]], theirs[rows[1]].detach()
            first = [first[0] + len(student_ids), first[1] + len(teacher_ids)]

    def cross_entropy(self):
        logs = self.student.head(self.student.hidden_states).log_softmax(-1)
        return -sum(logs[i, label] for i, label in enumerate(self.student.labels))

    def dense_map(self):
        entries, pinned = vocabulary_map(self.setup)
        matrix = torch.zeros(len(self.student.head.weight), len(self.teacher.head.weight), dtype=torch.float64)
        matrix[entries.rows, entries.columns] = torch.tensor(entries.weights).float().double()
        return matrix, dict(zip(pinned.rows.tolist(), pinned.columns.tolist(), strict=True))


def kl(q, p):
    return sum(b * (b.log() - a.log()) for a, b in zip(q, p, strict=True))


def p_kl_by_loops(case, temperature):
    matrix, _ = case.dense_map()
    support = matrix.sum(0).nonzero().squeeze(1)
    total = 0.0
    for own, theirs in case.chunk_logits():
        projected = sum((row / temperature).softmax(-1) @ matrix for row in own)[support]
        geometric = (sum((row / temperature).log_softmax(-1) for row in theirs) / len(theirs))[support].exp()
        total = total + kl(projected / projected.sum(), geometric / geometric.sum())
    return total


def h_kl_by_loops(case, temperature, threshold):
    matrix, pinned = case.dense_map()
    pairs, taken = dict(pinned), set(pinned.values())
    claims = (matrix >= threshold).nonzero().tolist()
    for student, teacher in sorted(claims, key=lambda claim: (-matrix[tuple(claim)], claim[0])):
        if student not in pairs and teacher not in taken:
            pairs[student] = teacher
            taken.add(teacher)
    total = 0.0
    for own, theirs in case.chunk_logits():
        q, p = ((sum((row / temperature).log_softmax(-1) for row in rows) / len(rows)).exp() for rows in (own, theirs))
        q, p = q / q.sum(), p / p.sum()
        q_rest = [q[i] for i in range(len(q)) if i not in pairs]
        p_rest = [p[i] for i in range(len(p)) if i not in taken]
        total = total + kl([*(q[i] for i in pairs), sum(q_rest)], [*(p[i] for i in pairs.values()), sum(p_rest)])
        ranks = max(len(q_rest), len(p_rest))
        ordered = [
            sorted(rest, reverse=True) + [torch.zeros((), dtype=torch.float64)] * (ranks - len(rest))
            for rest in (q_rest, p_rest)
        ]
        total = total + sum((a - b).abs() for a, b in zip(*ordered, strict=True))
    return total


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"loss": "p_kl"}, {"loss": "p_kl", "temperature": 2.0}, {"loss": "h_kl"}, {"loss": "h_kl", "common": "strict"}],
    ids=str,
)
def test_loss_and_every_gradient_by_loops(swap, settings, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    case = Case(*(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)[:: -1 if swap else 1])
    temperature = settings.get("temperature", 1.0)
    term = case.term(kd_weight=0.3, **settings)
    gradients = torch.autograd.grad(2 * term.sum, case.leaves)
    if settings["loss"] == "p_kl":
        distillation = p_kl_by_loops(case, temperature)
    else:
        distillation = h_kl_by_loops(case, temperature, 1.0 if "common" in settings else 0.6)
    expected = 0.7 * case.cross_entropy() + 0.3 * distillation
    torch.testing.assert_close(term.sum, expected, rtol=1e-6, atol=0)
    for gradient, by_loops in zip(gradients, torch.autograd.grad(2 * expected, case.leaves), strict=True):
        assert by_loops.abs().max() > 0.01
        torch.testing.assert_close(gradient, by_loops, rtol=1e-4, atol=1e-6)
    assert float(term.metrics["coverage"].sum) == 13
    assert 0 < float(term.metrics["teacher_mass_on_support"].sum) <= float(term.metrics["top1_agreement"].count) == 9


ONE_TO_ONE = ([[0, 1, 2], [-1, 0]], [[0, 1, 2], [-1, 0]])


@pytest.mark.parametrize("loss", ["p_kl", "h_kl"])
@pytest.mark.parametrize("fixture", ["tiny_bpe_tokenizer", "tiny_sentencepiece_tokenizer"])
def test_equal_tokenizers_reduce_to_plain_kl(loss, fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    case = Case(tokenizer, tokenizer, chunks=ONE_TO_ONE)
    matrix, _ = case.dense_map()
    assert torch.equal(matrix, torch.eye(len(tokenizer), dtype=torch.float64))
    logs = [side.head(side.hidden_states)[[0, 1, 2, 4]].log_softmax(-1) for side in (case.student, case.teacher)]
    expected = (logs[1].exp() * (logs[1] - logs[0])).sum().detach()
    torch.testing.assert_close(case.term(loss=loss, kd_weight=1.0).sum.detach(), expected)


@pytest.mark.parametrize("loss", ["p_kl", "h_kl"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_models_that_agree_give_zero_with_zero_gradient(loss, divergence, tiny_bpe_tokenizer):
    case = Case(tiny_bpe_tokenizer, tiny_bpe_tokenizer, chunks=ONE_TO_ONE)
    case.teacher = case.student
    case.setup = replace(case.setup, teacher_head=case.student.head)
    term = case.term(loss=loss, divergence=divergence, kd_weight=1.0)
    assert abs(float(term.sum.detach())) < 1e-12
    (gradient,) = torch.autograd.grad(term.sum, case.student.hidden_states)
    assert gradient.abs().max() < 1e-12
    assert float(term.metrics["top1_agreement"].sum) == 4


def test_hybrid_has_no_gradient_where_models_agree_on_a_strict_part(tiny_bpe_tokenizer):
    """The published KL over common tokens alone, without a bucket for the rest, has one there."""
    case = Case(tiny_bpe_tokenizer, tiny_bpe_tokenizer, chunks=ONE_TO_ONE)
    case.teacher = case.student
    objective = XToken(Config(loss="h_kl", kd_weight=1.0), replace(case.setup, teacher_head=case.student.head))
    kept, rest = torch.arange(0, 700, 2), torch.arange(1, 700, 2)
    objective.student_common = objective.teacher_common = kept
    objective.student_rest = objective.teacher_rest = rest
    term = objective(ForwardPair(case.student, case.student), case.batch)["x_token"]
    (gradient,) = torch.autograd.grad(term.sum, case.student.hidden_states)
    assert gradient.abs().max() < 1e-12
    log_q = case.student.head(case.student.hidden_states).log_softmax(-1)[:, kept]
    published = (log_q.exp().detach() * (log_q.detach() - log_q)).sum()
    assert torch.autograd.grad(published, case.student.hidden_states)[0].abs().max() > 0.01


def test_support_does_not_depend_on_the_micro_batch(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    """The published top-k of columns by the largest logit in the micro-batch does."""
    whole = Case(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    total = float(whole.term(kd_weight=1.0).sum.detach())
    first = (len(STUDENT_CHUNKS[0]), len(TEACHER_CHUNKS[0]))
    parts = 0.0
    for half, chunks in (
        (slice(0, 1), (STUDENT_CHUNKS[:1], TEACHER_CHUNKS[:1])),
        (slice(1, None), (STUDENT_CHUNKS[1:], TEACHER_CHUNKS[1:])),
    ):
        case = Case(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, chunks=chunks)
        sides = []
        for side, count in zip((whole.student, whole.teacher), first, strict=True):
            rows = slice(0, count) if half.start == 0 else slice(count, None)
            sides.append(
                replace(
                    side,
                    hidden_states=side.hidden_states[rows],
                    labels=side.labels[rows],
                    rows=side.rows[rows] - half.start,
                )
            )
        objective = XToken(Config(kd_weight=1.0), whole.setup)
        parts += float(objective(ForwardPair(*sides), case.batch)["x_token"].sum.detach())
    assert parts == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("loss", ["p_kl", "h_kl"])
def test_autocast_gives_nearly_the_same(loss, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    case = Case(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    sides = [
        replace(
            side,
            hidden_states=side.hidden_states.detach().float().requires_grad_(),
            head=replace(side.head, weight=side.head.weight.detach().float(), bias=side.head.bias.detach().float()),
        )
        for side in (case.student, case.teacher)
    ]
    objective = XToken(Config(loss=loss), case.setup)
    exact = objective(ForwardPair(*sides), case.batch)["x_token"].sum
    with torch.autocast("cpu", torch.bfloat16):
        term = objective(ForwardPair(*sides), case.batch)["x_token"]
        (gradient,) = torch.autograd.grad(term.sum, sides[0].hidden_states)
    assert term.sum.dtype == torch.float32
    torch.testing.assert_close(term.sum, exact, rtol=2e-2, atol=0)  # bfloat16 has 8 bits
    assert torch.isfinite(gradient).all()


def test_certain_models_give_finite_numbers(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    case = Case(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    for loss in ("p_kl", "h_kl"):
        sides = [
            replace(
                side,
                hidden_states=(side.hidden_states.detach() * 500).float().requires_grad_(),
                head=replace(side.head, weight=side.head.weight.detach().float(), bias=None, soft_cap=None),
            )
            for side in (case.student, case.teacher)
        ]
        term = XToken(Config(loss=loss), case.setup)(ForwardPair(*sides), case.batch)["x_token"]
        (gradient,) = torch.autograd.grad(term.sum, sides[0].hidden_states)
        assert math.isfinite(float(term.sum.detach()))
        assert torch.isfinite(gradient).all()


def test_no_chunk_gives_zero_and_says_so(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, caplog):
    nothing = tuple([[-1] * len(row) for row in rows] for rows in (STUDENT_CHUNKS, TEACHER_CHUNKS))
    case = Case(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, chunks=nothing)
    for loss in ("p_kl", "h_kl"):
        term = case.term(loss=loss, kd_weight=1.0)
        assert float(term.sum.detach()) == 0.0
        (gradient,) = torch.autograd.grad(term.sum, case.student.hidden_states)
        assert gradient.abs().max() == 0
    assert "none of the 15 supervised student positions" in caplog.text


# --- the map of two tokenizers ---------------------------------------------------------------------------------------


def test_map_of_two_tokenizers(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    student, teacher = tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer
    matrix, pinned = Case(student, teacher).dense_map()
    sums = matrix.sum(1)
    assert ((sums - 1).abs() < 1e-6).logical_or(sums == 0).all()
    assert int((matrix > 0).sum(1).max()) <= 4
    assert matrix[student.eos_token_id, teacher.eos_token_id] == 1.0
    own, other = token_bytes(student), token_bytes(teacher)
    by_bytes = {piece: i for i, piece in enumerate(other) if piece is not None}
    same = {i: piece for i, piece in enumerate(own) if piece is not None and piece in by_bytes}
    assert len(same) > 100
    for i, piece in same.items():
        assert other[int(matrix[i].argmax())] == piece
        assert matrix[i].max() == 1.0
    spelled = retokenized(student, teacher)
    several = [i for i in range(len(own)) if i not in pinned and len(spelled[i]) > 1]
    assert several
    first = [i for i in several if matrix[i, spelled[i][0]] == matrix[i].max()]
    assert len(first) > 0.9 * len(several)  # tokens spelled with the same piece may weigh as much


def test_the_templates_end_tokens_are_partners(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    case = Case(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    student_end = tiny_bpe_tokenizer.convert_tokens_to_ids("<|im_start|>")
    case.setup = replace(case.setup, student_end_token_id=student_end)
    matrix, pinned = case.dense_map()
    assert pinned[student_end] == pinned[tiny_bpe_tokenizer.eos_token_id] == tiny_sentencepiece_tokenizer.eos_token_id
    assert matrix[student_end].sum() == matrix[student_end, tiny_sentencepiece_tokenizer.eos_token_id] == 1.0


def test_columns_follow_the_objective_to_its_device(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    """Else the ids of both whole vocabularies would be sent there for every block of every step."""
    objective = XToken(Config(loss="h_kl"), Case(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer).setup).to("meta")
    columns = [objective.student_common, objective.student_rest, objective.teacher_common, objective.teacher_rest]
    assert [column.device.type for column in columns] == ["meta"] * 4
    assert not objective.state_dict()


def test_setting_without_effect_is_refused():
    with pytest.raises(ValidationError, match="common has no effect"):
        Config(common="strict")
