"""``objective.terms``: a weighted sum of objectives, each logged apart."""

import pytest
import torch

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.assembly import build_objective
from vocabridge.errors import UserError
from vocabridge.models.forward import forward_side, teacher_side
from vocabridge.objectives.base import ForwardPair
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples

GAN = {"hidden_size": 16}


@pytest.fixture
def world(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    # In float64: in float32 a number of a gradient whose parts nearly cancel is off by more than the bounds below.
    student = student_model(tiny_bpe_tokenizer).double()
    teacher = teacher_model(tiny_sentencepiece_tokenizer).double()
    tokenize = PairTokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, max_length=128)
    collate = PairCollator(tiny_bpe_tokenizer.pad_token_id, tiny_sentencepiece_tokenizer.pad_token_id)
    batch = collate([tokenize(example) for example in read_examples(ROWS)])

    def build(objective):
        torch.manual_seed(0)
        built = build_objective(
            objective,
            student,
            tiny_bpe_tokenizer,
            teacher,
            tiny_sentencepiece_tokenizer,
            pair_tokenizer=tokenize,
        )
        return built.double().eval()

    def run(objective):
        """Terms, and the gradient of their weighted sum by parameter."""
        student.zero_grad()
        objective.zero_grad()
        own = forward_side(student, batch["input_ids"], batch["attention_mask"], batch["labels"])
        other = teacher_side(
            teacher, batch["teacher_input_ids"], batch["teacher_attention_mask"], batch["teacher_labels"]
        )
        terms = objective(ForwardPair(own, other), batch)
        sum(term.weight * term.sum for term in terms.values()).backward()
        return terms, [p.grad.clone() for p in (*student.parameters(), *objective.parameters())]

    return build, run


def test_cross_entropy_and_distillation_as_terms_equal_the_objective_with_its_own_weight(world):
    build, run = world
    _, alone = run(build({"name": "dskd_cma", "kd_weight": 0.25, "gan": GAN}))
    composed = build(
        {"terms": [{"name": "cross_entropy", "weight": 0.75}, {"name": "dskd_cma", "weight": 0.25, "gan": GAN}]}
    )
    terms, gradients = run(composed)
    assert terms.keys() >= {"cross_entropy", "dskd_cma/student_space", "dskd_cma/teacher_space", "dskd_cma/gan_keys"}
    assert "dskd_cma/coverage" in terms["dskd_cma/student_space"].metrics
    assert terms["dskd_cma/gan_keys"].weight == 1.0  # the discriminator learns at full rate
    for ours, expected in zip(gradients, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_an_objective_named_twice_has_two_names(world):
    build, run = world
    composed = build({"terms": [{"name": "cross_entropy", "weight": 2.0}, {"name": "cross_entropy", "weight": 3.0}]})
    terms, gradients = run(composed)
    assert list(terms) == ["cross_entropy", "cross_entropy_2/cross_entropy"]
    _, once = run(build("cross_entropy"))
    for ours, single in zip(gradients, once, strict=True):
        torch.testing.assert_close(ours, 5.0 * single, rtol=1e-4, atol=1e-5)


def test_learned_parts_of_all_terms_are_in_named_groups(world):
    build, _ = world
    composed = build({"terms": [{"name": "dskd_cma", "gan": GAN}, {"name": "dskd_cma", "gan": GAN}]})
    groups = composed.parameter_groups()
    assert set(groups) == {"projectors", "discriminator"}
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in composed.parameters())


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], r"objective.terms must be a list"),
        ([{"weight": 1.0}], r"objective.terms\[0\].name is missing"),
        ([{"name": "dskd_cme"}], r"objective.terms\[0\].name is 'dskd_cme'.*did you mean 'dskd_cma'"),
        ([{"name": "cross_entropy"}, {"name": "dskd_cma", "kd_weight": 0.5}], r"terms\[1\].kd_weight has no meaning"),
        ([{"name": "cross_entropy", "weight": 0}], r"terms\[0\].weight must be a number greater than 0"),
        ([{"name": "cross_entropy", "weight": float("inf")}], r"terms\[0\].weight must be a number greater than 0"),
        ([{"name": ".dskd_cma"}], r"terms\[0\].name cannot be used: objective '.dskd_cma' cannot be imported"),
        ([{"name": "dskd_cma", "temprature": 1.0}], r"terms\[0\].temprature is unknown; did you mean 'temperature'"),
    ],
)
def test_bad_terms_are_named(world, terms, message):
    build, _ = world
    with pytest.raises(UserError, match=message):
        build({"terms": terms})
