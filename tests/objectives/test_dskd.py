import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tiny_pair import ROWS, student_model
from vocabridge.errors import UserError
from vocabridge.models.forward import SideForward, forward_side, teacher_side
from vocabridge.models.heads import OutputHead, output_head
from vocabridge.objectives import dskd
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.dskd import Config, Dskd
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples

GRADIENT = {"rtol": 2e-4, "atol": 5e-6}
DSKD_V1 = {"projector_start": "random", "t2s_target": "label", "teacher_space_projector": "learned"}
PUBLISHED_NAMES = {
    "forward": "forward_kl",
    "reverse": "reverse_kl",
    "jensen_shannon": "js_divergence",
    "skewed_forward": "skewed_forward_kl",
    "skewed_reverse": "skewed_reverse_kl",
}


def golden_pair(case):
    """Batch A has prompts and padding: only its supervised positions are packed."""
    student_hidden, student_head = case.leaf("student_hidden"), case.leaf("student_lm_head_weight")
    mask = case.tensors["in.student_labels"] != -100
    assert torch.equal(mask, case.tensors["in.teacher_labels"] != -100)

    def side(name, hidden, weight):
        return SideForward(
            hidden_states=hidden[mask],
            input_ids=case.tensors[f"in.{name}_input_ids"][mask],
            labels=case.tensors[f"in.{name}_labels"][mask],
            rows=mask.nonzero()[:, 0],
            head=OutputHead(weight, None, None, 1.0),
            embedding=nn.Embedding(2, 2),
        )

    student = side("student", student_hidden, student_head)
    teacher = side("teacher", case.tensors["in.teacher_hidden"], case.tensors["in.teacher_lm_head_weight"])
    chunks = torch.full_like(mask, -1, dtype=torch.long)
    spans = torch.zeros(*mask.shape, 2, dtype=torch.long)
    for row, length in enumerate(mask.sum(1).tolist()):  # every token is a chunk of one byte of its own
        chunks[row, :length] = torch.arange(length)
        spans[row, :length] = torch.stack([torch.arange(length), torch.arange(length) + 1], -1)
    batch = {"chunk_ids": chunks, "teacher_chunk_ids": chunks, "spans": spans, "teacher_spans": spans}
    return ForwardPair(student, teacher), batch, student_hidden, student_head


@pytest.fixture
def of_golden(monkeypatch):
    """Builds the objective with the case's projectors; its toy tokenizer has no file, and both sides have the same."""
    monkeypatch.setattr(dskd, "check_same_tokenizer", lambda name, setup: 97)

    tokenizer = SimpleNamespace(eos_token_id=1)

    def build(case, pair, **settings):
        objective = Dskd(
            Config(**{**DSKD_V1, **settings}),
            ObjectiveSetup(
                student_hidden_size=32,
                student_embedding=nn.Embedding(2, 2),
                student_tokenizer=tokenizer,
                student_head=pair.student.head,
                teacher_hidden_size=48,
                teacher_head=pair.teacher.head,
                teacher_tokenizer=tokenizer,
            ),
        )
        for module, name in ((objective.teacher_to_student, "t2s"), (objective.student_to_teacher, "s2t")):
            with torch.no_grad():
                module.weight.copy_(case.tensors[f"in.projector_{name}_weight"])
                module.bias.copy_(case.tensors[f"in.projector_{name}_bias"])
        return objective

    return build


@pytest.mark.parametrize("divergence", PUBLISHED_NAMES)
def test_values_and_gradients_are_the_published_ones(golden, of_golden, divergence):
    case, published = golden("dskd_same_vocab_A"), PUBLISHED_NAMES[divergence]
    pair, batch, student_hidden, student_head = golden_pair(case)
    objective = of_golden(case, pair, divergence=divergence)
    (term,) = objective(pair, batch).values()
    expected = case.scalars
    assert term.count == expected["batch_denom"]
    metrics = {name: float(ratio.sum) for name, ratio in term.metrics.items()}
    assert metrics["coverage"] == expected["batch_denom"]
    assert metrics["cross_entropy"] == pytest.approx(expected["nll_loss"], rel=2e-5)
    assert metrics["t2s_cross_entropy"] == pytest.approx(expected["t2s_ce_loss"], rel=2e-5)
    assert metrics["t2s_divergence"] == pytest.approx(expected[f"{published}.t2s_kd_loss"], rel=2e-5)
    assert metrics["s2t_divergence"] == pytest.approx(expected["s2t_kd_loss"], rel=2e-5)
    assert float(term.sum.detach()) == pytest.approx(expected[f"{published}.total"], rel=2e-5)
    term.sum.backward()
    gradient = case.tensors[f"grad.total.{published}.student_hidden"]
    torch.testing.assert_close(student_hidden.grad, gradient, **GRADIENT)
    if divergence == "forward":
        torch.testing.assert_close(
            student_head.grad, case.tensors["grad.total.forward_kl.student_lm_head_weight"], **GRADIENT
        )
        for module, name in ((objective.teacher_to_student, "t2s"), (objective.student_to_teacher, "s2t")):
            for kind, parameter in (("weight", module.weight), ("bias", module.bias)):
                gradient = case.tensors[f"grad.total.forward_kl.projector_{name}_{kind}"]
                torch.testing.assert_close(parameter.grad, gradient, **GRADIENT)


class Agreeing:
    """A teacher that is the student."""

    def __init__(self, tokenizer, **settings):
        self.student = student_model(tokenizer, tied=False).double()
        self.teacher = copy.deepcopy(self.student).eval()
        tokenize = PairTokenizer(tokenizer, tokenizer, max_length=128)
        pad_id = tokenizer.pad_token_id
        self.batch = PairCollator(pad_id, pad_id)([tokenize(example) for example in read_examples(ROWS)])
        setup = ObjectiveSetup(
            student_hidden_size=32,
            student_embedding=self.student.get_input_embeddings(),
            student_tokenizer=tokenizer,
            student_head=output_head(self.student),
            teacher_hidden_size=32,
            teacher_head=output_head(self.teacher),
            teacher_tokenizer=tokenizer,
        )
        self.objective = Dskd(Config(**settings), setup).double()

    def terms(self):
        names = ("input_ids", "attention_mask", "labels")
        return self.objective(
            ForwardPair(
                forward_side(self.student, *(self.batch[name] for name in names)),
                teacher_side(self.teacher, *(self.batch[f"teacher_{name}"] for name in names)),
            ),
            self.batch,
        )


@pytest.mark.parametrize("teacher_space_projector", ["learned", "recomputed"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(tiny_bpe_tokenizer, teacher_space_projector):
    agreeing = Agreeing(tiny_bpe_tokenizer, teacher_space_projector=teacher_space_projector, kd_weight=1.0)
    for projector in (agreeing.objective.teacher_to_student, agreeing.objective.student_to_teacher):
        torch.testing.assert_close(projector.weight, torch.eye(32).double(), rtol=0, atol=1e-6)
        assert float(projector.bias.detach().abs().max()) == 0.0
    (term,) = agreeing.terms().values()
    metrics = {name: float(ratio.sum) / float(ratio.count) for name, ratio in term.metrics.items()}
    assert metrics["t2s_divergence"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["s2t_divergence"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["t2s_accuracy"] == 1.0
    assert metrics["coverage"] == 1.0
    term.sum.backward()
    gradients = [p.grad for p in agreeing.student.parameters() if p.grad is not None]
    assert gradients
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5
    # The projector's own cross-entropy goes on: its minimum is no projection at all but certainty.
    assert float(agreeing.objective.teacher_to_student.weight.grad.abs().max()) > 1e-3


def test_another_tokenizer_is_refused(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    student = student_model(tiny_bpe_tokenizer)
    setup = ObjectiveSetup(
        student_hidden_size=32,
        student_embedding=student.get_input_embeddings(),
        student_tokenizer=tiny_bpe_tokenizer,
        student_head=output_head(student),
        teacher_hidden_size=32,
        teacher_head=output_head(student),
        teacher_tokenizer=tiny_sentencepiece_tokenizer,
    )
    with pytest.raises(UserError, match="objective dskd needs a student and a teacher with the same tokenizer"):
        Dskd(Config(), setup)
