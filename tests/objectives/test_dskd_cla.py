import logging
from dataclasses import replace

import pytest
import torch

import dual_space_cases as cases
from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.alignment import token_bytes
from vocabridge.losses.cross_attention import same_chunk
from vocabridge.models.forward import forward_side, teacher_side
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.dskd_cla import Config, DskdCla
from vocabridge.objectives.dskd_clp import Config as ClpConfig
from vocabridge.objectives.dskd_clp import DskdClp
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples


def build(case, **settings):
    torch.manual_seed(0)
    return DskdCla(Config(query_start="random", **settings), cases.setup(*case.sizes)).double()


def mixing_of(objective, pair, batch):
    """The attention that a forward of ``objective`` uses."""
    seen = []
    terms = objective.terms
    objective.terms = lambda student, teacher, mixing, **values: (
        seen.append(mixing) or terms(student, teacher, mixing, **values)
    )
    objective(pair, batch)
    del objective.terms
    (mixing,) = seen
    return mixing


@pytest.mark.parametrize("divergence", cases.DIVERGENCES)
def test_values_and_gradients_are_the_published_ones(golden, divergence):
    case = golden("dskd_cla_F")
    sizes = (case.tensors["in.student_hidden"].shape[-1], case.tensors["in.teacher_hidden"].shape[-1])
    config = Config(divergence=divergence, statistics="batch", query_start="random")
    objective = DskdCla(config, cases.setup(*sizes))
    cases.check_golden(objective, case, divergence)
    mixing = mixing_of(objective, case.pair().forward, cases.golden_chunk_batch(case))
    torch.testing.assert_close(mixing.allowed.float(), case.tensors["out.chunk_mask"])
    torch.testing.assert_close(mixing.student_weights, case.tensors["out.t2s_weight"], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(mixing.teacher_weights, case.tensors["out.s2t_weight"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("vocabularies", [(5, 9), (9, 5)])
def test_loss_and_gradients_against_loops(vocabularies):
    case = cases.DualCase(vocabularies=vocabularies, seed=1)
    objective = build(case, temperature=1.5, kd_weight=0.7, score_scale=0.3)
    scores = [cases.attention_scores(case, objective, b, scale=0.3) for b in range(3)]

    def within_chunk(b, side, index, s_chunks, t_chunks):
        own, other = (s_chunks, t_chunks) if side == 0 else (t_chunks, s_chunks)
        partners = [k for k, chunk in enumerate(other) if chunk == own[index] >= 0]
        return cases.softmax_over({k: scores[b][index][k] if side == 0 else scores[b][k][index] for k in partners})

    terms = objective(case.pair, case.batch())
    right = terms["student_space"].metrics["t2s_accuracy"]
    assert 0 < float(right.sum) < float(right.count) == 10
    loss = sum(term.sum for term in terms.values())
    expected = cases.reference_loss(case, objective, within_chunk, temperature=1.5, kd_weight=0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)
    ours, reference = (case.gradients(value, objective) for value in (3 * loss, 3 * expected))
    assert ours.keys() == reference.keys() >= {"query_projector.weight", "hidden", "head"}
    for name, gradient in reference.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-11)


def test_chunks_of_one_token_leave_the_attention_no_choice():
    """Then the method is the same as the mean over the chunk, and trains no query."""
    case = cases.DualCase(cases.ONE_TO_ONE)
    objective = build(case)
    means = DskdClp(ClpConfig(), cases.setup(*case.sizes)).double()
    means.load_state_dict(objective.state_dict(), strict=False)
    ours = sum(term.sum for term in objective(case.pair, case.batch()).values())
    theirs = sum(term.sum for term in means(case.pair, case.batch()).values())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    gradients = case.gradients(ours, objective)
    assert float(gradients.pop("query_projector.weight").abs().max()) < 1e-12
    for name, gradient in case.gradients(theirs, means).items():
        torch.testing.assert_close(gradients[name], gradient)


def test_positions_without_a_counterpart_attend_to_nothing():
    """Published: near-uniform attention to every position, prompt and padding included."""
    case = cases.DualCase()
    objective = build(case, kd_weight=1.0)
    mixing = mixing_of(objective, case.pair, case.batch())
    reached = mixing.student.pack(mixing.student_weights.sum(2))
    covered = mixing.student_covered
    assert covered.tolist() == [chunk >= 0 for student, _ in cases.CHUNKS for chunk in student]
    torch.testing.assert_close(reached, covered.to(reached.dtype))
    terms = objective(case.pair, case.batch())
    coverage = terms["student_space"].metrics["coverage"]
    assert (int(coverage.sum), int(coverage.count)) == (10, 16)
    before = {name: float(term.sum.detach()) for name, term in terms.items()}
    moved = [state.hidden_states.detach().clone() for state in case.sides]
    moved[0][~covered] += 1.0
    pair = ForwardPair(*(replace(side, hidden_states=state) for side, state in zip(case.sides, moved, strict=True)))
    after = {name: float(term.sum.detach()) for name, term in objective(pair, case.batch()).items()}
    assert after == before


def test_no_chunk_at_all_gives_an_exact_zero_and_a_warning(caplog):
    case = cases.DualCase([([-1] * 4, [-1] * 3)])
    objective = build(case, kd_weight=1.0)
    with caplog.at_level(logging.WARNING):
        terms = objective(case.pair, case.batch())
    assert "dskd_cla: none of the 4 supervised student positions" in caplog.text
    loss = sum(term.sum for term in terms.values())
    assert float(loss.detach()) == 0.0
    gradients = case.gradients(loss, objective)
    assert {"hidden", "query_projector.weight", "teacher_to_student.weight"} <= gradients.keys()
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients.values())


def test_chunk_zero_is_not_the_absence_of_a_chunk():
    """Published: 0 marks both, since -0 is 0."""
    student, teacher = torch.tensor([[0, -1, 1]]), torch.tensor([[-1, 0, 1, -1]])
    expected = [[False, True, False, False], [False] * 4, [False, False, True, False]]
    assert same_chunk(student, teacher).tolist() == [expected]


def test_attention_pairs_predictions_of_the_same_text(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    """Published: the chunks are those of the tokens read, so a position is paired with predictions of other text."""
    tokenizers = (tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    models = student_model(tokenizers[0]), teacher_model(tokenizers[1])
    tokenize = PairTokenizer(*tokenizers, max_length=128)
    pairs = [tokenize(example) for example in read_examples(ROWS)]
    batch = PairCollator(tokenizers[0].pad_token_id, tokenizers[1].pad_token_id)(pairs)
    sides = [
        run(model, *(batch[f"{prefix}{field}"] for field in ("input_ids", "attention_mask", "labels")))
        for run, model, prefix in zip((forward_side, teacher_side), models, ("", "teacher_"), strict=True)
    ]
    objective = DskdCla(Config(query_start="random"), cases.setup(32, 48))
    mixing = mixing_of(objective, ForwardPair(*sides), batch)
    text = [token_bytes(tokenizer) for tokenizer in tokenizers]
    labels = [
        padding.pad(side.labels[:, None]).squeeze(2)
        for padding, side in zip((mixing.student, mixing.teacher), sides, strict=True)
    ]
    several = 0
    for b, i in mixing.student.mask.nonzero().tolist():
        partners = mixing.student_weights[b, i].nonzero().squeeze(1)
        assert len(partners) > 0
        spans = [mixing.teacher_weights[b, partners[0]].nonzero().squeeze(1), partners]
        assert i in spans[0].tolist()
        words = [b"".join(text[side][int(labels[side][b, k])] or b"end" for k in spans[side]) for side in (0, 1)]
        assert words[0] == words[1]
        several += len(spans[0]) != len(spans[1])
    assert several > 20  # the tokenizers do differ
