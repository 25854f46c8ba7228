import pytest
import torch

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.alignment import encode_continuation, token_bytes
from vocabridge.models.forward import forward_side, supervised_tokens, teacher_side
from vocabridge.models.heads import output_head
from vocabridge.objectives import _paired_space
from vocabridge.objectives._columns import shared_columns
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.objectives.dskd import Config as DskdConfig
from vocabridge.objectives.dskd import Dskd
from vocabridge.objectives.dskd_eta import Config, DskdEta
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples


class World:
    """Two tiny models and the rows under both tokenizers, in float64."""

    def __init__(self, student_tokenizer, teacher_tokenizer, rows=ROWS):
        self.tokenizers = (student_tokenizer, teacher_tokenizer)
        self.student = student_model(student_tokenizer).double()
        self.teacher = teacher_model(teacher_tokenizer).double()
        tokenize = PairTokenizer(student_tokenizer, teacher_tokenizer, max_length=256)
        collate = PairCollator(student_tokenizer.pad_token_id, teacher_tokenizer.pad_token_id)
        self.batch = collate([tokenize(example) for example in read_examples(rows)])
        self.setup = ObjectiveSetup(
            student_hidden_size=32,
            student_embedding=self.student.get_input_embeddings(),
            student_tokenizer=student_tokenizer,
            student_head=output_head(self.student),
            teacher_hidden_size=48,
            teacher_head=output_head(self.teacher),
            teacher_tokenizer=teacher_tokenizer,
        )

    def forward(self):
        names = ("input_ids", "attention_mask", "labels")
        return ForwardPair(
            forward_side(self.student, *(self.batch[name] for name in names)),
            teacher_side(self.teacher, *(self.batch[f"teacher_{name}"] for name in names)),
        )

    def pairs(self, monkeypatch):
        """The pairs that the objective finds, as lists of packed positions."""
        found = []
        objective = DskdEta(Config(), self.setup).double()
        monkeypatch.setattr(_paired_space.PairedSpace, "paired_terms", lambda self, pair, pairs: found.append(pairs))
        objective(self.forward(), self.batch)
        return found[0].student.tolist(), found[0].teacher.tolist()


@pytest.fixture
def world(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    return World(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)


def test_pairs_are_the_same_bytes_at_the_same_place(world, monkeypatch):
    """By loops over prefixes: a pair is a token with equal bytes behind equal bytes, or the two end tokens."""
    expected = []
    tables = [token_bytes(tokenizer) for tokenizer in world.tokenizers]
    sides = [
        supervised_tokens(world.batch["input_ids"], world.batch["labels"]),
        supervised_tokens(world.batch["teacher_input_ids"], world.batch["teacher_labels"]),
    ]
    for row in range(len(ROWS)):
        starts = []
        for side, table in zip(sides, tables, strict=True):
            text, own = b"", {}
            for position in (side.rows == row).nonzero()[:, 0].tolist():
                piece = table[int(side.labels[position])]
                own[(text, piece)] = position
                text += piece or b""
            starts.append(own)
        expected += [(position, starts[1][key]) for key, position in starts[0].items() if key in starts[1]]
    assert len(expected) > 40
    assert [list(side) for side in zip(*sorted(expected), strict=True)] == list(world.pairs(monkeypatch))


def published_walk(student_pieces, teacher_pieces):
    """Pairs of the published walk: strings without markers, a pair only where all that was read is equal."""
    student, teacher = (
        [piece.replace("\u2581", "").replace("\u0120", "") for piece in side]
        for side in (student_pieces, teacher_pieces)
    )
    i = j = 0
    read_student, read_teacher, pairs = "", "", []
    while i < len(student) and j < len(teacher):
        if read_student == read_teacher and student[i] == teacher[j]:
            pairs.append((i, j))
        step_student = len(read_student) <= len(read_teacher)
        step_teacher = len(read_teacher) <= len(read_student)
        if step_student:
            read_student += student[i]
        if step_teacher:
            read_teacher += teacher[j]
        i, j = i + step_student, j + step_teacher
    return pairs


@pytest.mark.parametrize("text", ["é The capital of France is Paris.", "one\nThe capital of France is Paris."])
def test_no_pair_is_lost_behind_an_accent_or_a_line_break(
    tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, text, monkeypatch
):
    """The published walk compares spellings of different alphabets: no token behind the accent finds its partner."""
    tokenizers = (tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    ids = [encode_continuation(tokenizer, text).ids for tokenizer in tokenizers]
    pieces = [tokenizer.convert_ids_to_tokens(own) for tokenizer, own in zip(tokenizers, ids, strict=True)]
    world = World(*tokenizers, rows=[{"prompt": "Say it.\n", "response": text}])
    ours = list(zip(*world.pairs(monkeypatch), strict=True))
    assert ours[-1] == (len(ids[0]), len(ids[1]))  # the end tokens
    published = published_walk(*pieces)
    behind = pieces[0].index("\u0120capital") if "\u0120capital" in pieces[0] else 4
    assert not [pair for pair in published if pair[0] >= behind]
    assert len([pair for pair in ours[:-1] if pair[0] >= behind]) >= 3


def test_teachers_predictions_are_named_by_their_bytes(world):
    objective = DskdEta(Config(), world.setup)
    tables = [token_bytes(tokenizer) for tokenizer in world.tokenizers]
    ends = [tokenizer.eos_token_id for tokenizer in world.tokenizers]
    named = 0
    for teacher_id, target in enumerate(objective.targets.tolist()):
        piece = tables[1][teacher_id]
        if teacher_id == ends[1]:
            assert target == ends[0]
        elif piece is None or piece not in tables[0]:
            assert target == -1, piece
        else:
            assert tables[0][target] == piece
            named += 1
    assert named > 100
    unknown = world.tokenizers[1].unk_token_id
    assert objective.targets[unknown] == -1


def test_pairs_whose_prediction_the_student_cannot_say_are_left_out(world):
    objective = DskdEta(Config(projector_start="random"), world.setup).double()
    (all_terms,) = objective(world.forward(), world.batch).values()
    covered = float(all_terms.metrics["coverage"].sum)
    objective.targets.fill_(-1)
    (term,) = objective(world.forward(), world.batch).values()
    pair = world.forward()
    found = world.teacher.lm_head(pair.teacher.hidden_states).argmax(-1) == pair.teacher.labels
    assert 0 <= float(term.metrics["coverage"].sum) <= int(found.sum()) < covered
    label = DskdEta(Config(projector_start="random", t2s_target="label"), world.setup).double()
    (labelled,) = label(world.forward(), world.batch).values()
    assert float(labelled.metrics["coverage"].sum) > covered


@pytest.mark.parametrize("t2s_target", ["label", "teacher_argmax"])
def test_equal_tokenizers_give_dskd(tiny_bpe_tokenizer, t2s_target):
    world = World(tiny_bpe_tokenizer, tiny_bpe_tokenizer)
    with torch.no_grad():  # a control token has no bytes, so only dskd can name it: the teacher never predicts one
        for token_id, piece in enumerate(token_bytes(tiny_bpe_tokenizer)):
            if piece is None and token_id != tiny_bpe_tokenizer.eos_token_id:
                world.teacher.lm_head.weight[token_id] = 0
    losses, gradients = [], []
    for config_class, objective_class in ((Config, DskdEta), (DskdConfig, Dskd)):
        settings = {"t2s_target": t2s_target, "teacher_space_projector": "learned"}
        objective = objective_class(config_class(**settings), world.setup).double()
        world.student.zero_grad()
        (term,) = objective(world.forward(), world.batch).values()
        assert float(term.metrics["coverage"].sum) == term.count
        assert float(term.metrics["t2s_divergence"].sum) > 0
        term.sum.backward()
        losses.append(term.sum)
        gradients.append([p.grad.clone() for p in (*world.student.parameters(), *objective.parameters())])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_the_divergence_in_the_teachers_space_is_the_chosen_one(world):
    terms = [
        next(iter(DskdEta(Config(divergence=name), world.setup).double()(world.forward(), world.batch).values()))
        for name in ("forward", "reverse")
    ]
    values = [float(term.metrics["s2t_divergence"].sum) for term in terms]
    assert values[0] != pytest.approx(values[1], rel=1e-6)


def test_shared_tokens_end_with_the_end_tokens(world):
    shared = shared_columns(world.setup)
    student, teacher = world.tokenizers
    assert (int(shared.student[-1]), int(shared.teacher[-1])) == (student.eos_token_id, teacher.eos_token_id)
    for mine, theirs in zip(shared.student[:-1].tolist(), shared.teacher[:-1].tolist(), strict=True):
        assert token_bytes(student)[mine] == token_bytes(teacher)[theirs] is not None
