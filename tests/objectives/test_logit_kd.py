import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

import tokenizer_zoo
from random_sides import divergence_by_formula, random_sides
from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.assembly import build_objective
from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.config import Divergence
from vocabridge.objectives.logit_kd import Config, LogitKd
from vocabridge.pairs import PairTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = {
    "forward": "forward_kl",
    "reverse": "reverse_kl",
    "jensen_shannon": "js_divergence",
    "skewed_forward": "skewed_forward_kl",
    "skewed_reverse": "skewed_reverse_kl",
}
"""Of the code released with DSKD-KQ; its adaptive divergence divides by the temperature twice, see test_divergences."""


def loss_by_loops(sides, config, *, size, partner=None):
    """kd_weight, temperature and divergence by the formula, one row at a time; ``partner[k]`` is the teacher's id of
    the student's id k."""
    student, teacher = sides.forward.student, sides.forward.teacher
    partner = partner or {k: k for k in range(size)}
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(student.labels.tolist()):
        z, z_teacher = student.head(student.hidden_states[i]), teacher.head(teacher.hidden_states[i])
        p = (z[list(partner)] / config.temperature).softmax(0)
        q = (z_teacher[list(partner.values())] / config.temperature).softmax(0)
        kd = divergence_by_formula(config.divergence, q, p, beta=config.jsd_beta, skew=config.skew)
        total = total + (1 - config.kd_weight) * (z.logsumexp(0) - z[label]) + config.kd_weight * kd
    return total


@pytest.mark.parametrize("name", get_args(Divergence))
@pytest.mark.parametrize("padding", [(0, 9), (9, 0)])
def test_value_and_gradients_by_loops(tiny_bpe_tokenizer, name, padding):
    sides = random_sides(tiny_bpe_tokenizer, tiny_bpe_tokenizer, rows=ROWS[:2], extra_head_rows=padding)
    own = {"generalised_jsd": {"jsd_beta": 0.8}, "skewed_forward": {"skew": 0.2}, "skewed_reverse": {"skew": 0.2}}
    config = Config(divergence=name, kd_weight=0.3, temperature=1.7, **own.get(name, {}))
    term = LogitKd(config, sides.setup)(sides.forward, sides.batch)["logit_kd"]
    expected = loss_by_loops(sides, config, size=len(tiny_bpe_tokenizer))
    torch.testing.assert_close(term.sum, expected)
    assert float(term.metrics["coverage"].sum) == term.metrics["coverage"].count == term.count
    for got, wanted in zip(sides.gradients(term.sum), sides.gradients(expected), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted)


CHAT_CONTROL = ("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>")


def test_end_tokens_of_the_templates_reach_the_columns():
    tokenizer = tokenizer_zoo.byte_level_bpe(control=CHAT_CONTROL)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    pair_tokenizer = PairTokenizer(tokenizer, tokenizer, student_template="chat")
    models = student_model(tokenizer), tokenizer, teacher_model(tokenizer), tokenizer
    objective = build_objective("logit_kd", *models, pair_tokenizer=pair_tokenizer)
    columns = dict(zip(objective.student_columns.tolist(), objective.teacher_columns.tolist(), strict=True))
    assert {i: j for i, j in columns.items() if i != j} == {1: 2, 2: 1}
    assert not objective.same_end


def test_end_tokens_are_each_others_column_by_loops():
    tokenizer = tokenizer_zoo.byte_level_bpe(control=CHAT_CONTROL)
    sides = random_sides(tokenizer, tokenizer, rows=ROWS[:2])
    chat_end, plain_end = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    sides.setup = replace(sides.setup, student_end_token_id=chat_end)
    is_end = sides.forward.student.labels == plain_end
    assert int(is_end.sum()) == 2
    sides.forward.student.labels[is_end] = chat_end
    config = Config(kd_weight=0.4)
    term = LogitKd(config, sides.setup)(sides.forward, sides.batch)["logit_kd"]
    partner = {k: k for k in range(len(tokenizer))} | {chat_end: plain_end, plain_end: chat_end}
    expected = loss_by_loops(sides, config, size=len(tokenizer), partner=partner)
    assert (expected - loss_by_loops(sides, config, size=len(tokenizer))).detach().abs() > 0.01
    torch.testing.assert_close(term.sum, expected)
    assert term.metrics["coverage"].sum == term.count
    for got, wanted in zip(sides.gradients(term.sum), sides.gradients(expected), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", get_args(Divergence))
def test_models_that_agree_have_exactly_no_distillation(tiny_bpe_tokenizer, name):
    sides = random_sides(tiny_bpe_tokenizer, tiny_bpe_tokenizer, rows=ROWS[:2])
    student = sides.forward.student
    copy = SideForward(
        student.hidden_states.detach().clone(),
        student.input_ids,
        student.labels,
        student.rows,
        OutputHead(student.head.weight.detach().clone(), student.head.bias.detach().clone(), None, 1.0),
        student.embedding,
    )
    config = Config(divergence=name, kd_weight=1.0)
    term = LogitKd(config, sides.setup)(ForwardPair(student, copy), sides.batch)["logit_kd"]
    assert float(term.sum.detach()) == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in sides.gradients(term.sum))
    assert term.metrics["top1_agreement"].sum == term.metrics["top1_agreement"].count


def test_a_stated_factor_of_the_weight_is_hintons_temperature_squared(tiny_bpe_tokenizer):
    """The docstring's way to T^2: equal gradients up to one factor on the whole loss."""
    sides = random_sides(tiny_bpe_tokenizer, tiny_bpe_tokenizer, rows=ROWS[:2])
    weight, temperature = 0.3, 3.0

    def gradients(kd_weight):
        objective = LogitKd(Config(kd_weight=kd_weight, temperature=temperature), sides.setup)
        return sides.gradients(objective(sides.forward, sides.batch)["logit_kd"].sum)

    reference, distillation = gradients(0.0), gradients(1.0)
    factor = 1 - weight + weight * temperature**2
    scaled = gradients(weight * temperature**2 / factor)
    for hard, soft, got in zip(reference, distillation, scaled, strict=True):
        torch.testing.assert_close(factor * got, (1 - weight) * hard + weight * temperature**2 * soft)


def test_no_aligned_row_gives_cross_entropy_alone_and_a_warning(tiny_bpe_tokenizer, caplog):
    sides = random_sides(tiny_bpe_tokenizer, tiny_bpe_tokenizer, rows=ROWS[:2])
    num_tokens = len(sides.forward.student.labels)
    for name in ("chunk_ids", "teacher_chunk_ids"):
        sides.batch[name] = torch.full_like(sides.batch[name], -1)
    for kd_weight in (1.0, 0.5):
        with caplog.at_level(logging.WARNING):
            term = LogitKd(Config(kd_weight=kd_weight), sides.setup)(sides.forward, sides.batch)["logit_kd"]
        assert f"none of the {num_tokens} supervised student positions" in caplog.text
        assert float(term.metrics["divergence"].sum) == 0.0
        gradients = sides.gradients(term.sum)
        assert (float(term.sum.detach()) == 0.0) == (kd_weight == 1.0)
        assert all((gradient.count_nonzero() == 0) == (kd_weight == 1.0) for gradient in gradients)


@pytest.fixture(scope="module")
def published():
    tensors = load_file(GOLDEN / "case_dskd_same_vocab_A.safetensors")
    return tensors, json.loads((GOLDEN / "case_dskd_same_vocab_A.json").read_text())["scalars"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_and_gradients_of_the_published_code(published, tiny_bpe_tokenizer, name):
    tensors, scalars = published
    labels = tensors["in.student_labels"]
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    hidden = tensors["in.student_hidden"].clone().requires_grad_()

    def side(packed, weight):
        ids = tensors["in.student_input_ids"][rows, columns]
        return SideForward(
            packed, ids, labels[rows, columns], rows, OutputHead(weight, None, None, 1.0), torch.nn.Identity()
        )

    student = side(hidden[rows, columns], tensors["in.student_lm_head_weight"])
    teacher = side(tensors["in.teacher_hidden"][rows, columns], tensors["in.teacher_lm_head_weight"])
    per_row = (labels != -100).sum(1)
    chunks = torch.arange(int(per_row.max())).expand(len(labels), -1)
    chunks = torch.where(chunks < per_row[:, None], chunks, -1)
    batch = {"chunk_ids": chunks, "teacher_chunk_ids": chunks, "spans": torch.stack([chunks, chunks + 1], -1)}
    setup = random_sides(tiny_bpe_tokenizer, tiny_bpe_tokenizer, rows=ROWS[:1]).setup  # only its tokenizers are read
    config = Config(divergence=name, kd_weight=0.5, temperature=2.0)
    term = LogitKd(config, setup)(ForwardPair(student, teacher), batch)["logit_kd"]
    key = f"vanilla_kd.{PUBLISHED[name]}"
    assert term.count == scalars["batch_denom"] == 27
    assert float(term.metrics["cross_entropy"].sum) == pytest.approx(scalars["nll_loss"], rel=1e-5)
    assert float(term.metrics["divergence"].sum) == pytest.approx(scalars[f"{key}.kd_loss"], rel=1e-5)
    assert float(term.sum.detach()) / 27 == pytest.approx(scalars[f"{key}.returned_loss"], rel=1e-5)
    term.sum.backward()
    expected = tensors[f"grad.{key}.student_hidden"]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(hidden.grad, expected, rtol=2e-4, atol=5e-6)
