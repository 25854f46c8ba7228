"""Against plain loops over queries, keys and values made from the weights by hand, in float64."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError

import layer_case
from vocabridge.distillation_model import DistillationModel
from vocabridge.errors import UserError
from vocabridge.models.capture import LayerRequest, TrunkShape, trunk_shape
from vocabridge.models.forward import position_ids
from vocabridge.models.heads import output_head
from vocabridge.models.teacher import LiveTeacher
from vocabridge.objectives.attention_relations import AttentionRelations, Config
from vocabridge.objectives.base import ObjectiveSetup

PAIRS = [("gpt2", "llama"), ("llama", "gemma3"), ("gemma3", "gpt2")]
RELATIONS = ("query_key", "query_query", "key_key", "value_value")
ONE = {"student_tokens": torch.tensor(1.0, dtype=torch.float64)}


def _setup(student, teacher, **changes):
    trunks = {"student_trunk": trunk_shape(student), "teacher_trunk": trunk_shape(teacher)} | changes
    return ObjectiveSetup(
        student_hidden_size=16,
        student_embedding=student.get_input_embeddings(),
        student_tokenizer=None,
        student_head=output_head(student),
        teacher_hidden_size=24,
        **trunks,
    )


class _Case:
    """Models, objective and the captured forward of the trainer."""

    def __init__(self, families=("llama", "gemma3"), *, student=None, teacher=None, **settings):
        self.student = student or layer_case.model(families[0], "student")
        teacher = teacher or layer_case.model(families[1], "teacher", seed=1)
        self.objective = AttentionRelations(Config(**settings), _setup(self.student, teacher))
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


def _projections(model, batch, prefix, layer):
    """``{part: [N, heads, head_dim]}`` by applying the weights to the reported input of the layer."""
    ids, mask, labels = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels"))
    out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), output_hidden_states=True)
    states = torch.stack([out.hidden_states[layer - 1][b, t - 1] for b, t in (labels != -100).nonzero().tolist()])
    if model.config.model_type == "gpt2":
        block = model.transformer.h[layer - 1]
        fused = block.ln_1(states) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        width = fused.shape[1] // 3
        parts = [fused[:, i * width : (i + 1) * width].view(len(fused), 4, width // 4) for i in range(3)]
    else:
        block = model.model.layers[layer - 1]
        states, attention = block.input_layernorm(states), block.self_attn
        parts = [
            (states @ projection.weight.T).view(len(states), num_heads, -1)
            for projection, num_heads in ((attention.q_proj, 4), (attention.k_proj, 2), (attention.v_proj, 2))
        ]
    return dict(zip(("query", "key", "value"), parts, strict=True)), out.logits


def _chunk_vectors(states, side, pool):
    """By example and chunk: all heads of the chunk's state in a row, key-value heads once per query head."""
    widened = torch.stack([states[:, head * states.shape[1] // 4] for head in range(4)], dim=1).flatten(1)
    return [
        [widened[chunk[0]] if pool == "first" else sum(widened[p] for p in chunk) / len(chunk) for chunk in chunks]
        for chunks in layer_case.chunk_positions(side)
    ]


def _log_row(left, right, i, head, num_heads):
    size = len(left[i]) // num_heads
    part = slice(head * size, (head + 1) * size)
    scores = torch.stack([(left[i][part] * right[j][part]).sum() / math.sqrt(size) for j in range(i + 1)])
    return scores - torch.log(torch.exp(scores).sum())


def _by_hand(case, layers, relations, num_heads, pool, kd_weight):
    total = torch.zeros((), dtype=torch.float64)
    for k, k_teacher in layers:
        mine, logits = _projections(case.student, case.batch, "", k)
        with torch.no_grad():
            theirs, _ = _projections(case.teacher.model, case.batch, "teacher_", k_teacher)
        for relation in relations:
            one, other = relation.split("_")
            student = [_chunk_vectors(mine[part], "student", pool) for part in (one, other)]
            teacher = [_chunk_vectors(theirs[part], "teacher", pool) for part in (one, other)]
            for example in range(3):
                for i in range(len(student[0][example])):
                    for head in range(num_heads):
                        p = _log_row(teacher[0][example], teacher[1][example], i, head, num_heads)
                        q = _log_row(student[0][example], student[1][example], i, head, num_heads)
                        total = total + (p.exp() * (p - q)).sum() / num_heads / len(layers) / len(relations)
    labels = case.batch["labels"]
    rows = [(logits[b, t - 1], labels[b, t]) for b, t in (labels != -100).nonzero().tolist()]
    cross_entropy = sum(torch.logsumexp(z, 0) - z[y] for z, y in rows)
    return (1 - kd_weight) * cross_entropy + kd_weight * total


@pytest.mark.parametrize("families", PAIRS)
@pytest.mark.parametrize(
    ("relations", "layers", "num_heads", "pool"),
    [
        (("query_key", "value_value"), [[-1, -1]], 2, "first"),
        (("query_query", "key_key", "value_value"), [[1, 2], [3, 1]], 8, "mean"),
        (("query_key",), [[2, 2]], 1, "mean"),
    ],
)
def test_loss_and_every_gradient(families, relations, layers, num_heads, pool):
    case = _Case(families, relations=relations, layers=layers, num_relation_heads=num_heads, pool=pool, kd_weight=0.7)
    gradients = case.gradients()
    loss = case.loss()
    positive = [tuple(layer % 4 for layer in pair) for pair in layers]  # of three layers
    expected = _by_hand(case, positive, relations, num_heads, pool, 0.7)
    torch.testing.assert_close(loss, expected)
    case.trained.zero_grad()
    expected.backward()
    reference = {name: p.grad for name, p in case.trained.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys() == dict(case.trained.named_parameters()).keys()
    for name, gradient in gradients.items():
        # RMSNorm rounds to float32 inside, and the reference passes it a second time.
        error = (gradient - reference[name]).abs().max() / reference[name].abs().max()
        assert error < 1e-6, f"{name}: {float(error):.1e}"
    assert all(parameter.grad is None for parameter in case.teacher.model.parameters())


def test_log():
    case = _Case(kd_weight=1.0, relations=RELATIONS)
    loss = float(case.loss().detach())
    each = [case.tally[f"{name}_divergence"].tolist() for name in RELATIONS]
    assert {num_chunks for _, num_chunks in each} == {7}
    assert min(value for value, _ in each) > 0
    assert sum(value for value, _ in each) / 4 == pytest.approx(loss)
    assert case.tally["coverage"].tolist() == [7, layer_case.NUM_TOKENS]
    mean = _Case(pool="mean")
    mean.loss()
    assert mean.tally["coverage"].tolist() == [9, layer_case.NUM_TOKENS]


@pytest.mark.parametrize("families", PAIRS)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_gradient_reaches_the_projections_and_every_layer_below_and_nothing_above(families, layer):
    gradients = _Case(families, layers=[[layer, -1]], kd_weight=1.0).gradients()
    reached = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    numbers = {int(part) for name in reached for part in name.split(".") if part.isdigit()}
    assert numbers == set(range(layer))
    in_chosen = {name.split(f".{layer - 1}.")[1].split(".")[-2] for name in reached if f".{layer - 1}." in name}
    if families[0] == "gpt2":
        assert in_chosen == {"ln_1", "c_attn"}
    else:
        assert in_chosen == {"input_layernorm", "q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("pool", ["first", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_identical_models_have_no_divergence_and_no_gradient(family, pool):
    twins = [layer_case.model(family, "student") for _ in range(2)]
    case = _Case(student=twins[0], teacher=twins[1], kd_weight=1.0, pool=pool, relations=RELATIONS, layers=[[2, 2]])
    for name in ("input_ids", "attention_mask", "labels", "chunk_ids"):
        case.batch[f"teacher_{name}"] = case.batch[name]
    gradients = case.gradients()
    assert float(case.loss().detach()) == pytest.approx(0, abs=1e-10)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-10
    with torch.no_grad():
        next(case.student.parameters()).mul_(1.5)
        for parameter in case.student.parameters():
            parameter.add_(0.01)
    assert max(float(gradient.abs().max()) for gradient in case.gradients().values()) > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_activation_checkpointing_changes_no_gradient(family):
    expected = _Case((family, "llama"), layers=[[2, 2]]).gradients()
    student = layer_case.model(family, "student").train()
    student.activation_checkpointing_enable()
    found = _Case(student=student, teacher=layer_case.model("llama", "teacher", seed=1), layers=[[2, 2]]).gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_adapters_are_trained_and_nothing_else_is():
    torch.manual_seed(0)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = get_peft_model(layer_case.model("llama", "student"), adapter).double()
    gradients = _Case(student=student, layers=[[2, 1]], kd_weight=1.0).gradients()
    assert gradients
    assert all("lora_" in name for name in gradients)
    reached = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert {int(part) for name in reached for part in name.split(".") if part.isdigit()} == {0, 1}
    assert any(".layers.1.self_attn.q_proj" in name for name in reached)


def test_default_heads_are_the_most_that_divide_both_widths():
    def heads(student_width, teacher_width, given=None):
        shapes = [TrunkShape(3, 16, 16, width) for width in (student_width, teacher_width)]
        student, teacher = layer_case.model("llama", "student"), layer_case.model("llama", "teacher")
        setup = _setup(student, teacher, student_trunk=shapes[0], teacher_trunk=shapes[1])
        return AttentionRelations(Config(num_relation_heads=given), setup).num_heads

    assert heads(768, 1024) == 32
    assert heads(768, 768) == 48
    assert heads(7, 5) == 1
    assert heads(768, 1024, 64) == 64
    with pytest.raises(UserError, match=r"num_relation_heads 12 does not divide .* 768 .* 1024 .* a divisor of 256"):
        heads(768, 1024, 12)
    with pytest.raises(UserError, match="the teacher has no attention"):
        heads(768, None)


def test_layers():
    case = _Case(layers=[[-1, 2], [1, 2]])
    assert case.objective.layers.student == LayerRequest(attention=(1, 3))
    assert case.objective.layers.teacher == LayerRequest(attention=(2,))
    with pytest.raises(UserError, match="objective attention_relations, layers: student layer 0 does not exist"):
        _Case(layers=[[0, 1]])
    with pytest.raises(ValidationError, match="relations"):
        Config(relations=["key_query"])
    with pytest.raises(ValidationError, match="relations"):
        Config(relations=["key_key", "key_key"])


def test_no_chunk_warns_and_teaches_nothing(caplog):
    case = _Case(kd_weight=1.0)
    for name in ("chunk_ids", "teacher_chunk_ids"):
        case.batch[name] = torch.full_like(case.batch[name], -1)
    gradients = case.gradients()
    assert float(case.loss().detach()) == 0.0
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) == 0.0
    assert "none of the 12 supervised student positions" in caplog.text
