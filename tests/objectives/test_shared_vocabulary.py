import copy
import logging
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokenizer_zoo
from random_sides import divergence_by_formula, random_sides
from tiny_pair import ROWS
from vocabridge.alignment import token_bytes
from vocabridge.errors import UserError
from vocabridge.models.heads import OutputHead
from vocabridge.objectives import shared_vocabulary
from vocabridge.objectives._columns import ColumnPairs
from vocabridge.objectives.base import ForwardPair
from vocabridge.objectives.config import Divergence
from vocabridge.objectives.logit_kd import Config as LogitKdConfig
from vocabridge.objectives.logit_kd import LogitKd
from vocabridge.objectives.shared_vocabulary import Config, SharedVocabularyKd

NAME = "shared_vocabulary"

OWN_SETTINGS = {"generalised_jsd": {"jsd_beta": 0.8}, "skewed_forward": {"skew": 0.2}, "skewed_reverse": {"skew": 0.2}}


def shared_ids(setup):
    """Ids of equal bytes and the end tokens; of several ids with the same bytes an ordinary piece is taken."""
    tables = [token_bytes(t) for t in (setup.student_tokenizer, setup.teacher_tokenizer)]
    by_bytes = []
    for tokenizer, table in zip((setup.student_tokenizer, setup.teacher_tokenizer), tables, strict=True):
        ids = {}
        for token_id, data in enumerate(table):
            is_fallback = tokenizer.convert_ids_to_tokens(token_id).startswith("<0x")
            if data is not None and (data not in ids or not is_fallback):
                ids[data] = token_id
        by_bytes.append(ids)
    return [(i, by_bytes[1][data]) for data, i in by_bytes[0].items() if data in by_bytes[1]] + [setup.end_token_ids]


def paired_positions(pairs, tables):
    """``(i, j)`` by the text that each side has read: the same bytes before, the same token next, or both end."""
    found, offsets = [], [0, 0]
    for pair in pairs:
        read = []
        for side, table in zip((pair.student, pair.teacher), tables, strict=True):
            pieces = [table[label] for label in side.labels if label != -100]
            read.append([(b"".join(p or b"" for p in pieces[:k]), piece) for k, piece in enumerate(pieces)])
        found += [
            (offsets[0] + i, offsets[1] + j)
            for i, mine in enumerate(read[0])
            for j, theirs in enumerate(read[1])
            if mine == theirs
        ]
        offsets = [offsets[0] + len(read[0]), offsets[1] + len(read[1])]
    return found


def on_shared(logits, ids, config):
    """Probabilities over the shared tokens, and over the rest as one more where there is a bucket."""
    probabilities = (logits / config.temperature).softmax(0)
    shared = probabilities[ids]
    if config.rest == "ignore":
        return shared / shared.sum()
    outside = torch.ones_like(probabilities, dtype=torch.bool)
    outside[ids] = False
    return torch.cat([shared, probabilities[outside].sum()[None]])


def loss_by_loops(sides, config):
    student, teacher, setup = sides.forward.student, sides.forward.teacher, sides.setup
    columns = shared_ids(setup)
    student_ids, teacher_ids = [i for i, _ in columns], [j for _, j in columns]
    tables = [token_bytes(t) for t in (setup.student_tokenizer, setup.teacher_tokenizer)]
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(student.labels.tolist()):
        z = student.head(student.hidden_states[i])
        total = total + (1 - config.kd_weight) * (z.logsumexp(0) - z[label])
    positions = paired_positions(sides.pairs, tables)
    for i, j in positions:
        p = on_shared(student.head(student.hidden_states[i]), student_ids, config)
        q = on_shared(teacher.head(teacher.hidden_states[j]), teacher_ids, config)
        kd = divergence_by_formula(config.divergence, q, p, beta=config.jsd_beta, skew=config.skew)
        total = total + config.kd_weight * kd
    return total, len(positions)


def call(config, sides, forward=None):
    return SharedVocabularyKd(config, sides.setup)(forward or sides.forward, sides.batch)[NAME]


@pytest.fixture
def tokenizers(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    return tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer


@pytest.mark.parametrize("rest", ["ignore", "bucket"])
@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("swapped", [False, True])
def test_value_and_gradients_by_loops(tokenizers, divergence, rest, swapped):
    sides = random_sides(*tokenizers[:: -1 if swapped else 1], rows=ROWS[:3], soft_cap=4.0)
    config = Config(
        divergence=divergence, rest=rest, kd_weight=0.3, temperature=1.7, **OWN_SETTINGS.get(divergence, {})
    )
    term = call(config, sides)
    expected, num_pairs = loss_by_loops(sides, config)
    torch.testing.assert_close(term.sum, expected)
    assert float(term.metrics["coverage"].sum) == num_pairs > 15
    assert term.metrics["coverage"].count == term.count == len(sides.forward.student.labels) > num_pairs
    for got, wanted in zip(sides.gradients(term.sum), sides.gradients(expected), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("control", "rest"), [(("<|endoftext|>",) * 2, "ignore"), (("<|pad|>", "<|endoftext|>"), "bucket")]
)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "generalised_jsd", "adaptive"])
def test_equal_tokenizers_reduce_to_logit_kd(control, rest, divergence):
    """Where no token but the end is a control token, or one other, which then is the bucket."""
    tokenizer = tokenizer_zoo.byte_level_bpe(control=control)
    sides = random_sides(tokenizer, tokenizer, rows=ROWS[:3])
    settings = {"divergence": divergence, "temperature": 1.5, "kd_weight": 0.6, **OWN_SETTINGS.get(divergence, {})}
    mine = call(Config(rest=rest, **settings), sides)
    other = LogitKd(LogitKdConfig(**settings), sides.setup)(sides.forward, sides.batch)["logit_kd"]
    torch.testing.assert_close(mine.sum, other.sum)
    for name in ("divergence", "coverage", "top1_agreement"):
        assert float(mine.metrics[name].sum) == pytest.approx(float(other.metrics[name].sum))
    for got, wanted in zip(sides.gradients(mine.sum), sides.gradients(other.sum), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_models_that_agree_on_shared_tokens_have_no_distillation(tokenizers, divergence):
    sides = random_sides(*tokenizers, rows=ROWS[:2])
    student, teacher = sides.forward.student, sides.forward.teacher
    tables = [token_bytes(t) for t in tokenizers]
    hidden = torch.randn(len(teacher.labels), 5, dtype=torch.float64)
    for i, j in paired_positions(sides.pairs, tables):
        hidden[j] = student.hidden_states[i].detach()
    weight, bias = torch.randn(len(tokenizers[1]), 5, dtype=torch.float64), torch.randn(800, dtype=torch.float64)
    for i, j in shared_ids(sides.setup):
        weight[j], bias[j] = student.head.weight[i].detach(), student.head.bias[i].detach()
    agreeing = replace(teacher, hidden_states=hidden, head=OutputHead(weight, bias, None, 1.0))
    term = call(Config(divergence=divergence, kd_weight=1.0), sides, ForwardPair(student, agreeing))
    # Two matrix products of different width may differ in the last bit.
    assert term.sum.detach().abs() < 1e-12
    if divergence != "total_variation":  # its gradient is of sign(p - q), whatever the size of the difference
        assert max(float(gradient.abs().max()) for gradient in sides.gradients(term.sum)) < 1e-12
    assert term.metrics["top1_agreement"].sum == term.metrics["top1_agreement"].count > 0
    assert call(Config(divergence=divergence, kd_weight=1.0), sides).sum.detach() > 0.1


def test_every_example_of_a_batch_is_aligned(tokenizers):
    """The released code walks over the flattened batch and loses all examples after the first mismatch."""
    together = call(Config(), random_sides(*tokenizers)).metrics["coverage"]
    alone = [call(Config(), random_sides(*tokenizers, rows=[row])).metrics["coverage"] for row in ROWS]
    assert all(ratio.sum >= 2 for ratio in alone)
    assert together.sum == sum(ratio.sum for ratio in alone)
    assert together.count == sum(ratio.count for ratio in alone)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_bucket_that_one_side_cannot_fill_is_refused(tokenizers, swapped):
    """GPT-2 under OPT: every token is shared, so the student's bucket has probability 0 and the KL no bound."""
    small = tokenizer_zoo.byte_level_bpe(control=("<|endoftext|>",) * 2)
    large = copy.deepcopy(small)
    large.add_tokens(["<|mask|>"], special_tokens=True)
    sides = random_sides(*(small, large)[:: -1 if swapped else 1], rows=ROWS[:1])
    assert math.isfinite(float(call(Config(), sides).sum.detach()))
    with pytest.raises(UserError, match=f"every token of the {'teacher' if swapped else 'student'} is shared"):
        call(Config(rest="bucket"), sides)


def test_jsd_beta_is_the_teachers_share(tokenizers):
    """The released code has it the other way round."""
    sides = random_sides(*tokenizers, rows=ROWS[:2])
    with torch.no_grad():  # a flat student and a sharp teacher, so that the two directions differ
        sides.forward.student.head.weight.mul_(0.1)
        sides.forward.student.head.bias.mul_(0.1)
        sides.forward.teacher.head.weight.mul_(2.0)
    right, wrong = (Config(divergence="generalised_jsd", jsd_beta=beta, kd_weight=1.0) for beta in (0.9, 0.1))
    got = call(right, sides).sum.detach()
    torch.testing.assert_close(got, loss_by_loops(sides, right)[0].detach())
    assert (got - loss_by_loops(sides, wrong)[0].detach()).abs() > 0.02 * got


def test_bucket_logs_the_mass_of_the_shared_tokens(tokenizers):
    sides = random_sides(*tokenizers, rows=ROWS[:2])
    term = call(Config(rest="bucket", temperature=3.0), sides)
    ids = shared_ids(sides.setup)
    tables = [token_bytes(t) for t in tokenizers]
    for index, (name, side) in enumerate(
        (("student", sides.forward.student), ("teacher", sides.forward.teacher)),
    ):
        columns = [pair[index] for pair in ids]
        expected = sum(
            float(side.head(side.hidden_states[pair[index]]).softmax(0)[columns].sum().detach())
            for pair in paired_positions(sides.pairs, tables)
        )
        ratio = term.metrics[f"{name}_shared_mass"]
        assert float(ratio.sum) == pytest.approx(expected)
        assert 0.1 < float(ratio.sum) / ratio.count < 0.95


def test_bucket_keeps_its_digits_where_nearly_all_mass_is_shared(tokenizers):
    """In float32 one minus the shared mass would be 0 or 6e-8, and its logarithm noise."""
    sides = random_sides(*tokenizers, rows=ROWS[:1])
    ids = [i for i, _ in shared_ids(sides.setup)]
    objective = SharedVocabularyKd(Config(rest="bucket", temperature=2.0), sides.setup)
    logits = torch.randn(4, len(tokenizers[0]), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    outside = torch.ones(logits.shape[1], dtype=torch.bool)
    outside[ids] = False
    logits[:, outside] -= 60.0
    expected = (logits / 2).softmax(1)[:, outside].sum(1).log() + (logits / 2).logsumexp(1)
    got = objective._bucket(logits.float(), objective.student_columns).squeeze(1) / 2
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0.0)


def test_the_teachers_logits_are_those_of_the_shared_tokens_only(tokenizers):
    sides = random_sides(*tokenizers)
    num_pairs = int(call(Config(), sides).metrics["coverage"].sum)
    num_ids = len(shared_ids(sides.setup))
    assert num_pairs * len(tokenizers[1]) > len(tokenizers[1]) * 7

    shapes = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            shapes.update(
                tuple(t.shape) for t in (result if isinstance(result, tuple) else [result]) if hasattr(t, "shape")
            )
            return result

    with Shapes():
        sides.gradients(call(Config(), sides).sum)
    assert (num_pairs, num_ids) in shapes
    assert (num_ids, 7) in shapes
    assert not [shape for shape in shapes if shape[-1:] == (len(tokenizers[1]),) and len(shape) == 2]


def test_no_aligned_row_gives_an_exact_zero_and_a_warning(tokenizers, caplog):
    sides = random_sides(*tokenizers, rows=ROWS[:2])
    for name in ("chunk_ids", "teacher_chunk_ids"):
        sides.batch[name] = torch.full_like(sides.batch[name], -1)
    for rest in ("ignore", "bucket"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            term = call(Config(kd_weight=1.0, rest=rest), sides)
        assert f"none of the {len(sides.forward.student.labels)} supervised student positions" in caplog.text
        assert float(term.sum.detach()) == 0.0
        assert all(gradient.count_nonzero() == 0 for gradient in sides.gradients(term.sum))


def test_vocabularies_without_a_common_token_are_refused(tokenizers, monkeypatch):
    sides = random_sides(*tokenizers, rows=ROWS[:1])
    only_ends = ColumnPairs(torch.tensor([1]), torch.tensor([2]))
    monkeypatch.setattr(shared_vocabulary, "shared_columns", lambda setup: only_ends)
    with pytest.raises(UserError, match="share no token"):
        SharedVocabularyKd(Config(), sides.setup)
