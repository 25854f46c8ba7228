"""The ablation ``gan.positions: all``: prompt and padding among queries and keys, as published."""

from __future__ import annotations

import pytest
import torch

from published_dskd_cma import GRADIENT, VALUE, published_matching, total
from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.matching.term import PositionCounts
from vocabridge.models.forward import forward_side, teacher_side
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.dskd_cma import Config, DskdCma
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples


def test_over_all_positions_the_adversarial_term_is_the_published_one(golden):
    """Batch U has prompts and padding. Published keys are divided by a deviation over these as well, ours are not."""
    case = golden("kq_gan_U")
    objective = published_matching(case, positions="all")
    pair, batch = case.masked_pair(), case.masked_batch()
    sides = objective.query_keys(
        pair.student.tokens,
        pair.teacher.tokens,
        student_embedding=pair.student.embedding,
        teacher_embedding=pair.teacher.embedding,
        num_examples=3,
    )
    found = objective.with_unsupervised(sides, pair.student, pair.teacher, batch=batch)
    supervised = {side: case.tensors[f"in.{side}_labels"] != -100 for side in ("student", "teacher")}
    published = {  # the supervised ones first
        name: torch.cat([case.tensors[key][supervised[side]], case.tensors[key][~supervised[side]]])
        for name, side, key in [
            ("queries", "student", "out.queries"),
            ("keys", "teacher", "out.keys"),
            ("gradient", "student", "grad.kq.queries"),
        ]
    }
    torch.testing.assert_close(found.queries, published["queries"], **VALUE)
    factor = (published["keys"] * found.keys).sum() / found.keys.square().sum()
    assert 0.5 < float(factor) < 2
    torch.testing.assert_close(factor * found.keys, published["keys"], **VALUE)

    counts = PositionCounts(len(pair.student.labels), len(pair.teacher.labels))
    terms = objective.matching(
        found.queries,
        factor * found.keys,
        query_rows=found.query_rows,
        key_rows=found.key_rows,
        num_examples=3,
        supervised=counts,
    )
    loss = total(terms, counts.queries, counts.keys)
    assert float(loss.detach()) == pytest.approx(case.scalars["kq_loss"], rel=2e-5)
    (gradient,) = torch.autograd.grad(loss, found.queries, retain_graph=True)
    torch.testing.assert_close(gradient, published["gradient"], **GRADIENT)
    loss.backward()
    for kind in ("weight", "bias"):
        expected = case.tensors[f"grad.kq.projector_query_{kind}"]
        torch.testing.assert_close(getattr(objective.query_projector, kind).grad, expected, **GRADIENT)


class Rows:
    """Two rows with prompts under both tiny tokenizers, their models, and an objective over all positions."""

    def __init__(self, tokenizers, **settings):
        self.tokenizers = tokenizers
        self.models = student_model(tokenizers[0]), teacher_model(tokenizers[1])
        setup = ObjectiveSetup(
            student_hidden_size=32,
            student_embedding=self.models[0].get_input_embeddings(),
            student_tokenizer=tokenizers[0],
            student_head=None,
            teacher_hidden_size=48,
            teacher_embedding=self.models[1].get_input_embeddings(),
            teacher_tokenizer=tokenizers[1],
        )
        torch.manual_seed(0)
        self.objective = DskdCma(Config(**settings), setup).eval()

    def batch(self, rows=ROWS[:3], **options):
        tokenize = PairTokenizer(*self.tokenizers, max_length=128)
        pad_ids = (tokenizer.pad_token_id for tokenizer in self.tokenizers)
        return PairCollator(*pad_ids, **options)([tokenize(example) for example in read_examples(rows)])

    def forward(self, batch):
        fields = ("input_ids", "attention_mask", "labels")
        return ForwardPair(
            forward_side(self.models[0], *(batch[field] for field in fields)),
            teacher_side(self.models[1], *(batch[f"teacher_{field}"] for field in fields)),
        )

    def terms(self, batch):
        return self.objective(self.forward(batch), batch)


@pytest.fixture
def tokenizers(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    return tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer


START = [{"query_start": "closed_form"}, {"query_start": "random"}, {"query_start": "random", "statistics": "batch"}]


@pytest.mark.parametrize("start", [*START, {"query_start": "random", "query_normalize": "scalar"}])
def test_over_all_positions_by_loops(tokenizers, start):
    """Means over every position of the padded rows; where nothing is supervised stands token id 0, twice."""
    rows = Rows(tokenizers, matching_weight=0.3, gan={"hidden_size": 8, "positions": "all"}, **start)
    batch = rows.batch()
    objective, discriminator = rows.objective, rows.objective.matching.gan.discriminator
    terms = rows.terms(batch)
    example = start.get("statistics") != "batch"
    for side, name in ((0, "gan_queries"), (1, "gan_keys")):
        ids, labels = (batch[f"{'teacher_' * side}{field}"] for field in ("input_ids", "labels"))
        table = rows.models[side].get_input_embeddings().weight.detach()
        supervised, everything, example_of = [], [], []
        for b in range(len(ids)):
            for t in range(1, ids.shape[1]):
                here = int(labels[b, t]) != -100
                tokens = (int(ids[b, t - 1]), int(labels[b, t])) if here else (0, 0)
                if start["query_start"] == "closed_form":
                    centre = (objective.student_center, objective.teacher_center)[side]
                    parts = [(table[i] - centre) / (table[i] - centre).norm() for i in tokens]
                else:
                    parts = [table[i] for i in tokens]
                everything.append(torch.cat(parts))
                supervised.append(here)
                example_of.append(b)
        points = torch.stack(everything)
        if start["query_start"] == "random" and (side == 1 or "query_normalize" in start):
            for b in range(len(ids)):
                own = [k for k, at in enumerate(example_of) if at == b]
                among = [k for k, here in enumerate(supervised) if here and (example_of[k] == b or not example)]
                points[own] = points[own] / torch.stack([everything[k] for k in among]).std()
        if side == 0:
            points = objective.query_projector(points)
        logits = discriminator(points)
        losses = -torch.log(logits.sigmoid() if side == 0 else 1 - logits.sigmoid())
        assert 0 < sum(supervised) < len(supervised)
        assert int(terms[name].count) == sum(supervised)
        torch.testing.assert_close(terms[name].sum / sum(supervised), losses.mean(), rtol=1e-5, atol=1e-6)
        right = [float(v) > 0 if side == 0 else float(v) <= 0 for v in logits.detach()]
        accuracy = next(iter(terms[name].metrics.values()))
        assert int(accuracy.sum) == sum(hit for hit, here in zip(right, supervised, strict=True) if here)
        assert int(accuracy.count) == sum(supervised)
        if side == 0:  # reversed on the way to the projector, and scaled
            expected = torch.autograd.grad(losses.mean(), objective.query_projector.weight, retain_graph=True)[0]
            mean = terms[name].sum / sum(supervised)
            found = torch.autograd.grad(mean, objective.query_projector.weight, retain_graph=True)[0]
            torch.testing.assert_close(found, -0.3 * expected, rtol=1e-4, atol=1e-7)


def test_over_all_positions_nothing_but_the_adversarial_term_changes(tokenizers):
    rows = {
        positions: Rows(tokenizers, gan={"hidden_size": 8, "positions": positions})
        for positions in ("supervised", "all")
    }
    batch = rows["all"].batch()
    wider = rows["all"].batch(pad_to_multiple_of=64)
    terms = {positions: case.terms(batch) for positions, case in rows.items()}
    padded = rows["all"].terms(wider)
    assert terms["all"].keys() == terms["supervised"].keys()
    for name, term in terms["supervised"].items():
        changed = name.startswith("gan_")
        assert torch.equal(term.sum, terms["all"][name].sum) != changed
        assert torch.allclose(term.sum, padded[name].sum, rtol=1e-5) != changed
        assert int(term.count) == int(terms["all"][name].count) == int(padded[name].count)
        for metric, ratio in term.metrics.items():
            assert float(ratio.sum) == float(terms["all"][name].metrics[metric].sum), metric
    embeddings = [model.get_input_embeddings() for model in rows["all"].models]
    probes = [case.objective.probe(batch, *embeddings) for case in rows.values()]
    assert probes[0] == probes[1], "distances are those of the supervised positions"


def test_gradient_norms_are_measured_over_all_positions(tokenizers):
    rows = Rows(tokenizers, query_start="random", gan={"hidden_size": 8, "positions": "all"})
    terms = rows.terms(batch := rows.batch())
    rows.objective.record_gradients(True)
    loss = rows.terms(batch)["gan_queries"].sum
    loss.backward()
    expected = torch.autograd.grad(terms["gan_queries"].sum, rows.objective.query_projector.weight)[0].norm()
    found = rows.objective.gradient_metrics()["query_gradient_norm_matching"]
    assert found == pytest.approx(float(expected), rel=1e-4)
