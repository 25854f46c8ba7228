import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import dual_space_cases as cases
from published_dskd_cma import DISCRIMINATOR, GRADIENT, VALUE, build, published_matching, total
from tiny_pair import ROWS, student_model
from vocabridge.models.forward import forward_side, teacher_side
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.dskd_cma import Config, DskdCma
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples

NAMES = {
    "forward": "forward_kl",
    "reverse": "reverse_kl",
    "jensen_shannon": "js_divergence",
    "skewed_forward": "skewed_forward_kl",
    "skewed_reverse": "skewed_reverse_kl",
}


@pytest.mark.parametrize("divergence", NAMES)
def test_values_and_gradients_are_the_published_ones(golden, divergence):
    case = golden("dskd_cma_F")
    published = NAMES[divergence]
    objective, pair = build(case, divergence=divergence), case.pair()
    terms = objective(pair.forward, case.batch())
    expected = case.scalars
    parts = {name: float(ratio.sum) for term in terms.values() for name, ratio in term.metrics.items()}
    assert parts["cross_entropy"] == pytest.approx(expected["nll_loss"], rel=2e-5)
    assert parts["t2s_cross_entropy"] == pytest.approx(expected["t2s_ce_loss"], rel=2e-5)
    assert parts["t2s_divergence"] == pytest.approx(expected[f"{published}.t2s_kd_loss"], rel=2e-5)
    assert parts["s2t_divergence"] == pytest.approx(expected["s2t_kd_loss"], rel=2e-5)
    assert parts["t2s_accuracy"] == expected["t2s_acc"]
    student_tokens = case.tensors["in.student_labels"].numel()
    loss = total(terms, student_tokens, None)
    assert float(loss.detach()) == pytest.approx(expected[f"{published}.returned_loss"], rel=2e-5)
    (loss * student_tokens).backward()
    torch.testing.assert_close(
        pair.student_hidden.grad, case.tensors[f"grad.total.{published}.student_hidden"], **GRADIENT
    )
    if divergence == "forward":
        for module, name in [
            (objective.query_projector, "query"),
            (objective.teacher_to_student, "t2s"),
            (objective.student_to_teacher, "s2t"),
        ]:
            for kind, parameter in [("weight", module.weight), ("bias", module.bias)]:
                published_gradient = case.tensors[f"grad.total.{published}.projector_{name}_{kind}"]
                torch.testing.assert_close(parameter.grad, published_gradient, **GRADIENT)
        published_gradient = case.tensors[f"grad.total.{published}.student_lm_head_weight"]
        torch.testing.assert_close(pair.student_head.grad, published_gradient, **GRADIENT)


def test_queries_and_keys_are_the_published_ones(golden):
    case = golden("dskd_cma_F")
    objective, pair = build(case), case.pair().forward
    inputs = objective.query_inputs(pair.student.tokens, pair.student.embedding, 3)
    keys = objective.keys(pair.teacher.tokens, pair.teacher.embedding, 3)
    torch.testing.assert_close(objective.queries(inputs), case.tensors["out.queries"].flatten(0, 1), **VALUE)
    torch.testing.assert_close(keys, case.tensors["out.keys"].flatten(0, 1), **VALUE)


def test_adversarial_term_has_the_published_value_and_gradients(golden):
    case = golden("kq_gan_F")
    objective = published_matching(case)
    queries = case.tensors["out.queries"].flatten(0, 1).clone().requires_grad_(True)
    keys = case.tensors["out.keys"].flatten(0, 1)
    terms = objective.matching(
        queries,
        keys,
        query_rows=torch.zeros(len(queries), dtype=torch.long),
        key_rows=torch.zeros(len(keys), dtype=torch.long),
        num_examples=1,
    )
    loss = total(terms, queries.shape[0], keys.shape[0])
    assert float(loss.detach()) == pytest.approx(case.scalars["kq_loss"], rel=2e-5)
    loss.backward()
    torch.testing.assert_close(queries.grad, case.tensors["grad.kq.queries"].flatten(0, 1), **GRADIENT)
    for ours, published in DISCRIMINATOR.items():
        module = getattr(objective.matching.gan.discriminator, ours)
        torch.testing.assert_close(module.weight.grad, case.tensors[f"grad.kq.kq_{published}_weight"], **GRADIENT)
        torch.testing.assert_close(module.bias.grad, case.tensors[f"grad.kq.kq_{published}_bias"], **GRADIENT)


def gradient_of(objective, case, only):
    """Gradients when a single term is minimised, by the name of what receives them."""
    objective.zero_grad()
    pair = case.pair()
    term = objective(pair.forward, case.batch())[only]
    (term.weight * term.sum).backward()
    gradients = {name: parameter.grad for name, parameter in objective.named_parameters()}
    return gradients | {"student_hidden": pair.student_hidden.grad, "student_head": pair.student_head.grad}


def receivers(gradients):
    return {name.split(".")[0] for name, grad in gradients.items() if grad is not None and bool(grad.abs().max() > 0)}


def test_each_term_trains_what_it_should_and_nothing_else(golden):
    case = golden("dskd_cma_F")
    objective = build(case, matching="gan")
    projectors = {"query_projector", "teacher_to_student", "student_to_teacher"}
    assert receivers(gradient_of(objective, case, "student_space")) == {
        "query_projector",
        "teacher_to_student",
        "student_hidden",
        "student_head",
    }
    assert receivers(gradient_of(objective, case, "teacher_space")) == {
        "query_projector",
        "student_to_teacher",
        "student_hidden",
    }
    assert receivers(gradient_of(objective, case, "gan_queries")) == {"query_projector", "matching"}
    assert receivers(gradient_of(objective, case, "gan_keys")) == {"matching"}
    groups = objective.parameter_groups()
    assert {name: sum(p.numel() for p in ps) for name, ps in groups.items()} == {
        "projectors": sum(p.numel() for name, p in objective.named_parameters() if name.split(".")[0] in projectors),
        "discriminator": sum(p.numel() for name, p in objective.named_parameters() if name.startswith("matching")),
    }


def test_student_head_gets_no_gradient_through_the_projected_teacher(golden):
    case = golden("dskd_cma_F")
    objective = build(case, kd_weight=1.0, divergence="forward")
    pair = case.pair()
    objective(pair.forward, case.batch())["student_space"].sum.backward()
    # With kd_weight 1 only the divergence of the student's own logits is left to reach the head.
    correct = objective(pair.forward, case.batch())["student_space"].metrics["t2s_accuracy"].sum
    assert 0 < float(correct) < 42
    own = case.tensors["grad.kd.forward_kl.student_lm_head_weight"]
    torch.testing.assert_close(pair.student_head.grad, own, **GRADIENT)


def test_gan_weight_scales_the_queries_gradient_but_not_the_discriminators(golden):
    case = golden("dskd_cma_F")
    torch.manual_seed(0)
    light = build(case, matching="gan", matching_weight=0.1)
    heavy = build(case, matching="gan", matching_weight=1.0)
    heavy.load_state_dict(light.state_dict())
    light.eval(), heavy.eval()
    small, large = (gradient_of(objective, case, "gan_queries") for objective in (light, heavy))
    assert float(small["query_projector.weight"].abs().max()) > 0
    torch.testing.assert_close(small["query_projector.weight"] * 10, large["query_projector.weight"])
    name = "matching.gan.discriminator.linear.weight"
    torch.testing.assert_close(small[name], large[name])


def test_gradient_meter_equals_the_norm_of_the_weight_gradient(golden):
    case = golden("dskd_cma_F")
    objective = build(case, matching="gan", matching_weight=0.5)
    objective.eval()
    objective.record_gradients(True)
    pair = case.pair()
    terms = objective(pair.forward, case.batch())
    total(terms, 42, 33).backward()
    metrics = objective.gradient_metrics()
    objective.record_gradients(False)
    by_term = {name: gradient_of(objective, case, name)["query_projector.weight"] for name in terms}
    kd = by_term["student_space"] / 42 + by_term["teacher_space"] / 42
    assert metrics["query_gradient_norm_kd"] == pytest.approx(float(kd.norm()), rel=1e-4)
    gan = by_term["gan_queries"] / 42
    assert metrics["query_gradient_norm_matching"] == pytest.approx(float(gan.norm()), rel=1e-4)
    assert metrics["query_gradient_ratio"] == pytest.approx(float(gan.norm() / kd.norm()), rel=1e-3)
    assert objective.gradient_metrics() == {}


def test_statistics_per_example_do_not_depend_on_the_other_examples(golden):
    case = golden("dskd_cma_F")
    objective = build(case, statistics="example")
    side = case.pair().forward.teacher
    together = objective.keys(side.tokens, side.embedding, 3)
    raw = torch.cat([side.embedding(side.input_ids), side.embedding(side.labels)], -1)
    for row in range(3):
        own = raw[side.rows == row]
        torch.testing.assert_close(together[side.rows == row], own / own.std())


def test_attention_and_loss_against_loops_in_float64(golden):
    """An independent version with Python loops over positions, from the formulas alone."""
    case = golden("dskd_cma_F")
    objective = build(case, statistics="example", divergence="reverse", temperature=1.5, kd_weight=0.7).double()
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in case.tensors.items()}
    case.tensors = tensors
    pair = case.pair()
    terms = objective(pair.forward, case.batch())
    weight = tensors["in.student_lm_head_weight"]
    teacher_weight = tensors["in.teacher_lm_head_weight"]
    expected = 0.0
    for b in range(3):
        student_hidden, teacher_hidden = tensors["in.student_hidden"][b], tensors["in.teacher_hidden"][b]
        s_in, s_out = tensors["in.student_input_ids"][b], tensors["in.student_labels"][b]
        t_in, t_out = tensors["in.teacher_input_ids"][b], tensors["in.teacher_labels"][b]
        s_embed, t_embed = tensors["in.student_embed_weight"], tensors["in.teacher_embed_weight"]
        key_inputs = torch.cat([t_embed[t_in], t_embed[t_out]], -1)
        keys = key_inputs / key_inputs.std()
        values = teacher_hidden / teacher_hidden.std() + t_embed[t_out] / t_embed[t_out].std()
        queries = objective.query_projector(torch.cat([s_embed[s_in], s_embed[s_out]], -1))
        scores = torch.tensor(
            [[float((q @ k).detach()) / math.sqrt(keys.shape[-1]) for k in keys] for q in queries], dtype=torch.float64
        )
        for i in range(len(s_in)):
            attention = scores[i].softmax(-1)
            mixed = sum(attention[j] * objective.teacher_to_student(values[j]) for j in range(len(t_in)))
            projected, own = weight @ mixed, weight @ student_hidden[i]
            expected += 0.3 * -own.log_softmax(-1)[s_out[i]] + 0.7 * -projected.log_softmax(-1)[s_out[i]]
            if int(projected.argmax()) == int(s_out[i]):
                p, q = (own / 1.5).softmax(-1), (projected / 1.5).softmax(-1)
                expected += 0.7 * (p * (p.log() - q.log())).sum()
        for j in range(len(t_in)):
            attention = scores[:, j].softmax(-1)
            mixed = sum(attention[i] * objective.student_to_teacher(student_hidden[i]) for i in range(len(s_in)))
            p = (teacher_weight @ teacher_hidden[j] / 1.5).softmax(-1)
            q = (teacher_weight @ mixed / 1.5).softmax(-1)
            expected += 0.7 * (p * (p.log() - q.log())).sum()
    assert float(sum(term.sum.detach() for term in terms.values())) == pytest.approx(float(expected.detach()), rel=1e-9)


@pytest.mark.parametrize("vocabularies", [(5, 9), (9, 5)])
def test_position_and_exact_pair_terms_against_loops(vocabularies):
    case = cases.DualCase(vocabularies=vocabularies, seed=7)
    config = Config(
        query_start="random",
        score_scale=0.3,
        position_weight=4.0,
        exact_pair_weight=0.6,
        matching="none",
        temperature=1.5,
        kd_weight=0.7,
    )
    torch.manual_seed(0)
    objective = DskdCma(config, cases.setup(*case.sizes)).double()
    scores = [cases.attention_scores(case, objective, b, scale=0.3, position_weight=4.0) for b in range(3)]

    def over_all(b, side, index, s_chunks, t_chunks):
        others = range(len(t_chunks)) if side == 0 else range(len(s_chunks))
        return cases.softmax_over({k: scores[b][index][k] if side == 0 else scores[b][k][index] for k in others})

    exact = [(1, 3, 4)]  # (example, student position, teacher position) of the chunks of one token on either side
    expected = cases.reference_loss(case, objective, over_all, temperature=1.5, kd_weight=0.7)
    for b, i, j in exact:
        expected = expected - 0.6 * over_all(b, 0, i, *case.chunks[b])[j].log()
    terms = objective(case.pair, case.batch())
    metrics = terms["student_space"].metrics
    assert float(metrics["exact_pair_cross_entropy"].count) == 1
    assert terms["exact_pairs"].is_auxiliary
    loss = sum(term.weight * term.sum for term in terms.values())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)
    ours, reference = (case.gradients(value, objective) for value in (3 * loss, 3 * expected))
    assert ours.keys() == reference.keys() >= {"query_projector.weight", "hidden", "head"}
    for name, gradient in reference.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-11)
    only = case.gradients(objective(case.pair, case.batch())["exact_pairs"].sum, objective)
    reached = {name.split(".")[0] for name, gradient in only.items() if float(gradient.abs().max()) > 0}
    assert reached == {"query_projector"}


def test_no_exact_pair_gives_an_exact_zero_with_a_gradient_path():
    case = cases.DualCase([([0, 0, -1], [0, -1])])
    config = Config(query_start="random", exact_pair_weight=1.0, matching="none")
    objective = DskdCma(config, cases.setup(*case.sizes)).double()
    term = objective(case.pair, case.batch())["exact_pairs"]
    assert float(term.sum.detach()) == 0.0
    assert float(case.gradients(term.sum, objective)["query_projector.weight"].abs().max()) == 0.0


def test_position_term_tells_repeated_tokens_apart(tiny_bpe_tokenizer):
    """Equal tokenizers and rotated embeddings: the closed form is exact up to repetitions, which need the position."""
    tokenizer = tiny_bpe_tokenizer
    student = nn.Embedding.from_pretrained(torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0)))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    teacher = nn.Embedding.from_pretrained(student.weight @ rotation)
    rows = [{"prompt": "Sing.", "response": "la la la the fox jumps la la the fox jumps la la la the fox"}]
    tokenize = PairTokenizer(tokenizer, tokenizer, max_length=128)
    batch = PairCollator(tokenizer.pad_token_id, tokenizer.pad_token_id)(
        [tokenize(example) for example in read_examples(rows)]
    )
    located = {}
    for weight in (0.0, 0.5):
        setup = ObjectiveSetup(
            student_hidden_size=8,
            student_embedding=student,
            student_tokenizer=tokenizer,
            student_head=None,
            teacher_hidden_size=8,
            teacher_embedding=teacher,
            teacher_tokenizer=tokenizer,
        )
        objective = DskdCma(Config(position_weight=weight, matching="none"), setup)
        located[weight] = objective.probe(batch, student, teacher)
    assert located[0.0]["exact_pair_accuracy"] < 0.7
    assert located[0.5]["exact_pair_accuracy"] == 1.0
    assert located[0.5]["exact_pair_cross_entropy"] < located[0.0]["exact_pair_cross_entropy"]


def test_a_gpt2_teacher_works(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    """Published: looks for its embedding under a name that GPT-2 does not have, and crashes."""
    student, tokenizers = (
        student_model(tiny_sentencepiece_tokenizer),
        (tiny_sentencepiece_tokenizer, tiny_bpe_tokenizer),
    )
    config = GPT2Config(vocab_size=len(tiny_bpe_tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128)
    teacher = GPT2LMHeadModel(config).eval()
    tokenize = PairTokenizer(*tokenizers, max_length=128)
    batch = PairCollator(*(tokenizer.pad_token_id for tokenizer in tokenizers))(
        [tokenize(example) for example in read_examples(ROWS[:2])]
    )
    setup = ObjectiveSetup(
        student_hidden_size=32,
        student_embedding=student.get_input_embeddings(),
        student_tokenizer=tokenizers[0],
        student_head=None,
        teacher_hidden_size=16,
        teacher_embedding=teacher.get_input_embeddings(),
        teacher_tokenizer=tokenizers[1],
    )
    fields = ("input_ids", "attention_mask", "labels")
    pair = ForwardPair(
        forward_side(student, *(batch[field] for field in fields)),
        teacher_side(teacher, *(batch[f"teacher_{field}"] for field in fields)),
    )
    loss = total(DskdCma(Config(), setup)(pair, batch), 1, 1)
    loss.backward()
    assert torch.isfinite(loss)
    assert float(student.get_input_embeddings().weight.grad.abs().max()) > 0


@pytest.mark.parametrize("matching", ["conditional_transport", "sinkhorn", "energy", "coral", "mmd"])
def test_every_kind_of_matching_pulls_at_the_queries_only(matching):
    case = cases.DualCase(cases.ONE_TO_ONE)
    objective = DskdCma(Config(query_start="random", matching=matching), cases.setup(*case.sizes)).double()
    terms = objective(case.pair, case.batch())
    own = [term.weight * term.sum for name, term in terms.items() if name not in ("student_space", "teacher_space")]
    gradients = case.gradients(sum(own), objective)
    reached = {name.split(".")[0] for name, gradient in gradients.items() if float(gradient.abs().max()) > 0}
    assert "query_projector" in reached
    assert reached <= {"query_projector", "matching"}


def test_unused_settings_are_refused():
    with pytest.raises(ValueError, match="query_normalize has no effect"):
        Config(query_normalize="scalar")
    with pytest.raises(ValueError, match="gan settings have no effect"):
        Config(matching="mmd", gan={"hidden_size": 3})
    with pytest.raises(ValueError, match="transport settings iterations have no effect"):
        Config(matching="gan", transport={"iterations": 3})
