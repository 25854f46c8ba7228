"""What holds for every objective in the folder, whoever wrote it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_pair import OBJECTIVE_SETTINGS, ROWS, student_model, teacher_model
from vocabridge.losses import chunked_head
from vocabridge.models.capture import trunk_shape
from vocabridge.models.forward import forward_side, teacher_side
from vocabridge.models.heads import output_head
from vocabridge.objectives import objective_class, objective_info, objective_names
from vocabridge.objectives.base import ForwardPair, ObjectiveSetup
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples

CASES = {name: (name, OBJECTIVE_SETTINGS.get(name, {})) for name in objective_names()} | {
    f"{name}-top_k": (name, {**OBJECTIVE_SETTINGS.get(name, {}), "teacher_top_k": 8})
    for name in ("dskd_cma", "dskd_eta")
}
"""Every objective, and settings that take another path through one."""

pytestmark = pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)


ALIGNED_OTHERWISE = {"dskd_cma", "cdm", "multilevel_ot", "mined"}
"""Attention, warping and transport see all positions, whatever the chunks; MinED teaches the label where no row is."""


class World:
    """Both models, one objective, and the rows under both tokenizers."""

    def __init__(self, name, settings, student_tokenizer, teacher_tokenizer):
        if "same_tokenizer" in objective_info(name).config_class.needs:
            teacher_tokenizer = student_tokenizer
        self.student, self.teacher = student_model(student_tokenizer), teacher_model(teacher_tokenizer)
        tokenize = PairTokenizer(student_tokenizer, teacher_tokenizer, max_length=128)
        self.pairs = [tokenize(example) for example in read_examples(ROWS)]
        self.pad_ids = (student_tokenizer.pad_token_id, teacher_tokenizer.pad_token_id)
        torch.manual_seed(0)
        self.objective = objective_class(name)(
            objective_info(name).config_class(**settings),
            ObjectiveSetup(
                student_hidden_size=32,
                student_embedding=self.student.get_input_embeddings(),
                student_tokenizer=student_tokenizer,
                student_head=output_head(self.student),
                teacher_hidden_size=48,
                teacher_embedding=self.teacher.get_input_embeddings(),
                teacher_head=output_head(self.teacher),
                teacher_tokenizer=teacher_tokenizer,
                student_trunk=trunk_shape(self.student),
                teacher_trunk=trunk_shape(self.teacher),
            ),
        ).eval()  # no dropout: the contract is about sums
        self.student.eval()

    def batch(self, pairs=None, **collator_options):
        return PairCollator(*self.pad_ids, **collator_options)(self.pairs if pairs is None else pairs)

    def terms(self, batch):
        layers = self.objective.layers
        student = forward_side(
            self.student, batch["input_ids"], batch["attention_mask"], batch["labels"], layers=layers.student
        )
        teacher = teacher_side(
            self.teacher,
            batch["teacher_input_ids"],
            batch["teacher_attention_mask"],
            batch["teacher_labels"],
            layers=layers.teacher,
        )
        return self.objective(ForwardPair(student, teacher), batch)

    def loss(self, batch, *, scale=1.0):
        return sum(term.weight * term.sum for term in self.terms(batch).values()) * scale

    def gradients(self, batch, *, scale=1.0):
        """Gradients of the summed loss with respect to everything, by name."""
        for module in (self.student, self.teacher, self.objective):
            module.zero_grad()
        self.loss(batch, scale=scale).backward()
        parts = {"student": self.student, "teacher": self.teacher, "objective": self.objective}
        return {
            f"{part}.{name}": parameter.grad.clone()
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }


@pytest.fixture
def world(name, settings, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    return World(name, settings, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)


def assert_same(first, second):
    """Equal gradients, up to float32 sums in another order (relative to each gradient's largest element)."""
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        error = (second[name] - gradient).abs().max() / scale
        assert float(error) < 5e-5, f"{name}: relative difference {float(error):.1e}"


def test_terms_are_finite_sums_with_counts(world):
    terms = world.terms(world.batch())
    assert terms
    for key, term in terms.items():
        assert term.sum.shape == (), key
        assert torch.isfinite(term.sum), key
        assert int(term.count) > 0, key
        assert term.sum.dtype == torch.float32, key
        for metric, ratio in term.metrics.items():
            assert not getattr(ratio.sum, "requires_grad", False), f"{key}.{metric} would keep the graph alive"


def test_gradient_reaches_the_student_and_its_own_parts_and_not_the_teacher(world):
    gradients = world.gradients(world.batch())
    assert not [name for name in gradients if name.startswith("teacher.")]
    for side, module in (("student", world.student), ("objective", world.objective)):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert float(gradients[f"{side}.{name}"].abs().max()) > 0, f"{side}.{name} would never be trained"


def test_parameter_groups_hold_every_trained_parameter_once(world):
    grouped = [id(p) for parameters in world.objective.parameter_groups().values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in world.objective.parameters() if p.requires_grad)


def test_sums_add_up_over_any_split_of_the_batch(world):
    whole = world.gradients(world.batch())
    parts = [world.gradients(world.batch(world.pairs[start:stop])) for start, stop in ((0, 1), (1, 4), (4, 8))]
    assert_same(whole, {name: sum(part[name] for part in parts) for name in whole})


def test_order_of_the_rows_does_not_matter(world):
    assert_same(world.gradients(world.batch()), world.gradients(world.batch(world.pairs[::-1])))


def test_padding_does_not_matter(world):
    expected = world.gradients(world.batch())
    assert_same(expected, world.gradients(world.batch(padding_side="left")))
    assert_same(expected, world.gradients(world.batch(pad_to_multiple_of=64)))


def test_chunk_size_does_not_matter(world, monkeypatch):
    expected = world.gradients(world.batch())
    shrink_chunks(monkeypatch)
    assert_same(expected, world.gradients(world.batch()))


def test_nothing_that_was_given_is_written_into(world):
    """Neither the batch nor what the models gave; and a second call finds the objective as the first did."""
    batch, given = world.batch(), []
    objective = world.objective
    world.objective = lambda pair, batch: given.append(pair) or objective(pair, batch)
    world.objective.layers = objective.layers
    loss = world.loss(batch)
    tensors = [*batch.values(), *(t for side in (given[0].student, given[0].teacher) for t in own_tensors(side))]
    before = [tensor.detach().clone() for tensor in tensors]
    again = sum(term.weight * term.sum for term in objective(given[0], batch).values())
    again.backward()
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0.0)


def own_tensors(side):
    return [side.hidden_states, side.input_ids, side.labels, side.rows, side.head.weight]


def test_no_logits_of_all_tokens_are_alive(world, monkeypatch):
    shrink_chunks(monkeypatch)
    batch = world.batch(world.pairs * 3)
    num_tokens = int((batch["labels"] != -100).sum())
    smallest_vocabulary = min(len(world.student.get_input_embeddings().weight), 700)
    with LargestTensor() as seen:
        world.loss(batch).backward()
    weights = max(p.numel() for m in (world.student, world.teacher, world.objective) for p in m.parameters())
    assert weights < num_tokens * smallest_vocabulary, "the test's batch is too small to tell"
    assert seen.numel < num_tokens * smallest_vocabulary


def test_upstream_factor_scales_the_gradient(world):
    once, thrice = world.gradients(world.batch()), world.gradients(world.batch(), scale=3.0)
    assert_same({name: 3 * gradient for name, gradient in once.items()}, thrice)


def test_no_supervised_row_gives_zero_with_a_gradient_path(world):
    batch = world.batch()
    for side in ("", "teacher_"):
        batch[f"{side}labels"] = torch.full_like(batch[f"{side}labels"], -100)
        batch[f"{side}chunk_ids"] = batch[f"{side}chunk_ids"][:, :0]
        batch[f"{side}spans"] = batch[f"{side}spans"][:, :0]
    loss = world.loss(batch)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(p.grad is None or float(p.grad.abs().max()) == 0.0 for p in world.student.parameters())


def test_supervised_rows_without_a_partner_teach_nothing_and_are_told_about(world, name, caplog):
    """Every position is in no chunk: what is aligned by chunks is an exact 0, and cross-entropy remains."""
    batch = world.batch()
    for side in ("", "teacher_"):
        batch[f"{side}chunk_ids"] = torch.full_like(batch[f"{side}chunk_ids"], -1)
    terms = world.terms(batch)
    metrics = {metric: ratio for term in terms.values() for metric, ratio in term.metrics.items()}
    num_tokens = int((batch["labels"] != -100).sum())
    loss = sum(term.weight * term.sum for term in terms.values())
    if "teacher" not in objective_info(name).config_class.needs:
        assert float(loss.detach()) == pytest.approx(float(world.loss(world.batch()).detach()), rel=1e-6)
    else:
        reference = (1 - world.objective.config.kd_weight) * metrics["cross_entropy"].sum
        distillation = float(loss.detach()) - float(reference)
        if name in ALIGNED_OTHERWISE:
            assert distillation > 1e-3
        else:
            assert distillation == pytest.approx(0.0, abs=1e-6 * float(reference))
            assert float(metrics["coverage"].sum) == 0
            assert f"none of the {num_tokens} supervised student positions" in caplog.text
    loss.backward()
    assert float(world.student.get_input_embeddings().weight.grad.abs().max()) > 0


def test_bfloat16_models_give_a_float32_loss_near_the_exact_one(world):
    expected = world.loss(world.batch()).detach()
    world.student.bfloat16(), world.teacher.bfloat16()
    terms = world.terms(world.batch())
    assert {term.sum.dtype for term in terms.values()} == {torch.float32}
    got = sum(term.weight * term.sum for term in terms.values()).detach()
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0.0)


def test_nothing_is_learned_from_evaluation(world):
    with torch.no_grad():
        assert not world.loss(world.batch()).requires_grad


def shrink_chunks(monkeypatch):
    """Make every chunked head work on one row at a time."""
    chunks = chunked_head._chunks
    monkeypatch.setattr(chunked_head, "_chunks", lambda num_rows, max_rows: chunks(num_rows, 1))


class LargestTensor(TorchDispatchMode):
    """Records the largest floating point tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.numel = max(self.numel, value.numel())
        return result
