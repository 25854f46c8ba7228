"""Against plain loops over the hidden states that the models report, in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError

import layer_case
from vocabridge.distillation_model import DistillationModel
from vocabridge.errors import UserError
from vocabridge.models.capture import LayerRequest, trunk_shape
from vocabridge.models.forward import position_ids
from vocabridge.models.heads import output_head
from vocabridge.models.teacher import LiveTeacher
from vocabridge.objectives.base import ObjectiveSetup
from vocabridge.objectives.hidden_state import Config, HiddenState

PAIRS = [("gpt2", "llama"), ("llama", "gemma3"), ("gemma3", "gpt2")]
ONE = {"student_tokens": torch.tensor(1.0, dtype=torch.float64)}


def _setup(student, teacher):
    return ObjectiveSetup(
        student_hidden_size=16,
        student_embedding=student.get_input_embeddings(),
        student_tokenizer=None,
        student_head=output_head(student),
        teacher_hidden_size=24,
        teacher_embedding=teacher.get_input_embeddings(),
        student_trunk=trunk_shape(student),
        teacher_trunk=trunk_shape(teacher),
    )


class _Case:
    """Models, objective and the captured forward of the trainer."""

    def __init__(self, families=("llama", "gemma3"), *, student=None, teacher=None, teacher_layers=3, **settings):
        self.student = student or layer_case.model(families[0], "student")
        teacher = teacher or layer_case.model(families[1], "teacher", num_layers=teacher_layers, seed=1)
        torch.manual_seed(2)
        self.objective = HiddenState(Config(**settings), _setup(self.student, teacher)).double()
        self.teacher = LiveTeacher(teacher, layers=self.objective.layers.teacher)
        self.trained = DistillationModel(self.student, self.objective)
        self.batch = layer_case.batch()

    def loss(self):
        loss, self.tally = self.trained(self.batch, self.teacher(self.batch), ONE)
        return loss

    def gradients(self):
        self.trained.zero_grad()
        self.loss().backward()
        return {name: p.grad.clone() for name, p in self.trained.named_parameters() if p.grad is not None}


def _reported(model, batch, prefix):
    """All hidden states and logits at the supervised positions, by a plain loop."""
    ids, mask, labels = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels"))
    out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), output_hidden_states=True)
    where = [(b, t) for b, t in (labels != -100).nonzero().tolist()]
    states = [[layer[b, t - 1] for b, t in where] for layer in out.hidden_states]
    return states, [out.logits[b, t - 1] for b, t in where], [int(labels[b, t]) for b, t in where]


def _pooled(states, positions, pool):
    return states[positions[0]] if pool == "first" else sum(states[p] for p in positions) / len(positions)


def _by_hand(case, layers, kind, pool, kd_weight):
    student, logits, labels = _reported(case.student, case.batch, "")
    with torch.no_grad():
        teacher, _, _ = _reported(case.teacher.model, case.batch, "teacher_")
    cross_entropy = sum(torch.logsumexp(z, 0) - z[y] for z, y in zip(logits, labels, strict=True))
    mine, theirs = layer_case.chunk_positions("student"), layer_case.chunk_positions("teacher")
    distance = 0.0
    for (k, k_teacher), projector in zip(layers, case.objective.projectors, strict=True):
        for example, chunks in enumerate(mine):
            for chunk, positions in enumerate(chunks):
                a = projector.weight @ _pooled(student[k], positions, pool) + projector.bias
                b = _pooled(teacher[k_teacher], theirs[example][chunk], pool)
                if kind == "cosine":
                    d = 1 - (a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt()
                else:
                    d = ((a - b) ** 2).sum() / (b * b).sum()
                distance = distance + d / len(layers)
    return (1 - kd_weight) * cross_entropy + kd_weight * distance


@pytest.mark.parametrize("families", PAIRS)
@pytest.mark.parametrize(("kind", "pool"), [("cosine", "first"), ("mse", "mean"), ("cosine", "mean"), ("mse", "first")])
def test_loss_and_every_gradient(families, kind, pool):
    case = _Case(families, layers=[[1, 2], [-1, 0], [2, -1]], loss=kind, pool=pool, kd_weight=0.7)
    gradients = case.gradients()
    loss = case.loss()
    expected = _by_hand(case, [(1, 2), (3, 0), (2, 3)], kind, pool, 0.7)
    torch.testing.assert_close(loss, expected)
    case.trained.zero_grad()
    expected.backward()
    reference = {name: p.grad for name, p in case.trained.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys() == dict(case.trained.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-6, atol=1e-9, msg=name)
    assert all(parameter.grad is None for parameter in case.teacher.model.parameters())


def test_log():
    case = _Case(kd_weight=1.0, layers=[[1, 2]])
    loss = case.loss()
    distance, num_chunks = case.tally["hidden_distance"].tolist()
    assert num_chunks == 7
    assert distance == pytest.approx(float(loss.detach()))
    assert case.tally["coverage"].tolist() == [7, layer_case.NUM_TOKENS]
    mean = _Case(kd_weight=1.0, pool="mean")
    mean.loss()
    assert mean.tally["coverage"].tolist() == [9, layer_case.NUM_TOKENS]
    assert "cross_entropy" not in case.tally  # its head is not applied
    shared = _Case(kd_weight=0.5)
    shared.loss()
    assert float(shared.tally["cross_entropy"][0]) > 0


def _layer_numbers(gradients):
    reached = [name for name, gradient in gradients.items() if gradient.abs().max() > 0]
    return {int(part) for name in reached for part in name.split(".") if part.isdigit() and "projectors" not in name}


@pytest.mark.parametrize("families", PAIRS)
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_gradient_reaches_every_layer_up_to_the_chosen_one_and_none_above(families, layer):
    gradients = _Case(families, layers=[[layer, -1]], kd_weight=1.0).gradients()
    assert _layer_numbers(gradients) == set(range(layer))
    assert gradients["objective.projectors.0.weight"].abs().max() > 0
    embedding = next(name for name in gradients if name.endswith(("wte.weight", "embed_tokens.weight")))
    assert gradients[embedding].abs().max() > 0


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("pool", ["first", "mean"])
def test_identical_models_are_at_distance_zero_without_gradient(kind, pool):
    """The projection starts as the identity where the widths agree."""
    twins = [layer_case.model("llama", "student") for _ in range(2)]
    case = _Case(student=twins[0], teacher=twins[1], kd_weight=1.0, loss=kind, pool=pool)
    for name in ("input_ids", "attention_mask", "labels", "chunk_ids"):
        case.batch[f"teacher_{name}"] = case.batch[name]
    gradients = case.gradients()
    assert float(case.loss().detach()) == pytest.approx(0, abs=1e-10)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-10
    with torch.no_grad():
        case.objective.projectors[0].weight[0, 1] = 0.5
    assert max(float(gradient.abs().max()) for gradient in case.gradients().values()) > 1e-3


def test_distilbert_is_the_last_layer_without_chunks_of_several_tokens():
    """One tokenizer, one width: 1 - cos of the two last hidden states, position by position."""
    twins = [layer_case.model("llama", "student", seed=seed) for seed in range(2)]
    case = _Case(student=twins[0], teacher=twins[1], kd_weight=1.0, layers=[[-1, -1]])
    for name in ("input_ids", "attention_mask", "labels"):
        case.batch[f"teacher_{name}"] = case.batch[name]
    identity = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, -1, -1, -1, -1], [0, 1, -1, -1, -1, -1, -1]])
    case.batch["chunk_ids"] = case.batch["teacher_chunk_ids"] = identity
    states = [_reported(model, case.batch, "")[0][3] for model in twins]
    expected = sum(1 - (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt()) for a, b in zip(*states, strict=True))
    assert float(case.loss().detach()) == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_activation_checkpointing_changes_no_gradient(family):
    expected = _Case((family, "llama")).gradients()
    student = layer_case.model(family, "student").train()
    student.activation_checkpointing_enable()
    found = _Case(student=student, teacher=layer_case.model("llama", "teacher", seed=1)).gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_adapters_are_trained_up_to_the_chosen_layer_and_nothing_else_is():
    torch.manual_seed(0)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = get_peft_model(layer_case.model("llama", "student"), adapter).double()
    gradients = _Case(student=student, layers=[[2, 1]], kd_weight=1.0).gradients()
    assert {name for name in gradients if "lora_" not in name} == {
        "objective.projectors.0.weight",
        "objective.projectors.0.bias",
    }
    assert _layer_numbers({name: g for name, g in gradients.items() if "lora_" in name}) == {0, 1}


def test_default_layers_are_the_last_and_a_proportional_middle():
    case = _Case(teacher_layers=6)
    assert case.objective.layers.student == LayerRequest(hidden_states=(1, 3))
    assert case.objective.layers.teacher == LayerRequest(hidden_states=(2, 6))
    assert [(p.student, p.teacher) for p in case.objective.pairs] == [(1, 2), (3, 6)]
    single = _Case(student=layer_case.model("llama", "student", num_layers=1), teacher_layers=6)
    assert [(p.student, p.teacher) for p in single.objective.pairs] == [(1, 6)]


def test_layers_that_do_not_exist():
    with pytest.raises(UserError, match=r"objective hidden_state, layers: student layer 4 does not exist: .* 3 layers"):
        _Case(layers=[[4, 1]])
    with pytest.raises(UserError, match="objective hidden_state, layers: teacher layer -5 does not exist"):
        _Case(layers=[[1, -5]])
    with pytest.raises(ValidationError, match="layers"):
        Config(layers=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projectors_in_another_precision_than_the_models(dtype):
    case = _Case(layers=[[1, 2]], kd_weight=1.0)
    expected = float(case.loss().detach())
    case.objective.to(dtype)
    assert float(case.loss().detach()) == pytest.approx(expected, rel=2e-2)
    assert case.gradients()["objective.projectors.0.weight"].dtype == dtype


def test_a_layer_named_twice_counts_once():
    case = _Case(layers=[[-1, -1], [3, 3]])
    assert len(case.objective.projectors) == 1


def test_no_chunk_warns_and_teaches_nothing(caplog):
    case = _Case(kd_weight=1.0)
    for name in ("chunk_ids", "teacher_chunk_ids"):
        case.batch[name] = torch.full_like(case.batch[name], -1)
    gradients = case.gradients()
    assert float(case.loss().detach()) == 0.0
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) == 0.0
    assert "none of the 12 supervised student positions" in caplog.text
