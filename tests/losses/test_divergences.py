import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vocabridge.losses import divergences
from vocabridge.losses.divergences import divergence

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = (
    "forward",
    "reverse",
    "jensen_shannon",
    "generalised_jsd",
    "skewed_forward",
    "skewed_reverse",
    "adaptive",
    "total_variation",
)
GOLDEN_NAMES = {
    "forward": "forward_kl",
    "reverse": "reverse_kl",
    "jensen_shannon": "js_divergence",
    "skewed_forward": "skewed_forward_kl",
    "skewed_reverse": "skewed_reverse_kl",
    "adaptive": "adaptive_kl",
}
SETTINGS = {"T1": (1.0, 1.0), "T2": (2.0, 1.0), "T2_tea1.5": (2.0, 1.5)}


def softmax(logits, temperature):
    scaled = [x / temperature for x in logits]
    highest = max(scaled)
    exps = [math.exp(x - highest) for x in scaled]
    return [e / sum(exps) for e in exps]


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mix(a, b, share):
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def adaptive_weights(p, q, alpha):
    """(g_head, g_tail): summed |q - p| over the teacher's head and tail."""
    head = tail = cumulative = 0.0
    for i in sorted(range(len(q)), key=lambda i: q[i]):
        cumulative += q[i]
        if cumulative <= alpha:
            tail += abs(q[i] - p[i])
        else:
            head += abs(q[i] - p[i])
    return head, tail


def loop_divergence(name, student, teacher, *, temperature=1.0, teacher_temperature=1.0, skew=0.1, alpha=0.5, beta=0.5):
    """One row, plain Python floats."""
    p, q = softmax(student, temperature), softmax(teacher, temperature * teacher_temperature)
    if name == "forward":
        return kl(q, p)
    if name == "reverse":
        return kl(p, q)
    if name in ("jensen_shannon", "generalised_jsd"):
        beta = beta if name == "generalised_jsd" else 0.5
        middle = mix(q, p, beta)
        return beta * kl(q, middle) + (1 - beta) * kl(p, middle)
    if name == "skewed_forward":
        return kl(q, mix(q, p, skew))
    if name == "skewed_reverse":
        return kl(p, mix(p, q, skew))
    if name == "total_variation":
        return sum(x - y for x, y in zip(p, q, strict=True) if x > y)
    head, tail = adaptive_weights(p, q, alpha)
    return (head * kl(q, p) + tail * kl(p, q)) / (head + tail)


def random_logits(rows=4, vocab=11, scale=3.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=generator, dtype=dtype) * scale
    teacher = torch.randn(rows, vocab, generator=generator, dtype=dtype) * scale
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("temperature", "teacher_temperature"), SETTINGS.values())
def test_matches_a_loop_in_python_floats(name, temperature, teacher_temperature):
    student, teacher = random_logits()
    settings = {"temperature": temperature, "teacher_temperature": teacher_temperature, "skew": 0.3}
    row_loss = divergence(name, adaptive_alpha=0.4, jsd_beta=0.15, **settings)
    expected = [
        loop_divergence(name, s, t, alpha=0.4, beta=0.15, **settings)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    torch.testing.assert_close(row_loss(student, teacher), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_finite_differences(name):
    student, teacher = random_logits(scale=1.0)
    row_loss = divergence(name, temperature=1.7, skew=0.2, jsd_beta=0.3)
    if name == "adaptive":  # the weights are constants to the gradient, so differences must hold them
        p, q = torch.softmax(student.detach() / 1.7, -1).tolist(), torch.softmax(teacher / 1.7, -1).tolist()
        weights = [adaptive_weights(a, b, 0.5) for a, b in zip(p, q, strict=True)]

        def value(logits):
            rows = zip(logits.tolist(), teacher.tolist(), weights, strict=True)
            return sum(
                (head * kl(softmax(t, 1.7), softmax(s, 1.7)) + tail * kl(softmax(s, 1.7), softmax(t, 1.7)))
                / (head + tail)
                for s, t, (head, tail) in rows
            )

        expected = torch.zeros_like(student)
        for i in range(student.numel()):
            step = torch.zeros_like(student).view(-1)
            step[i] = 1e-5
            step = step.view_as(student)
            expected.view(-1)[i] = (value(student.detach() + step) - value(student.detach() - step)) / 2e-5
        (gradient,) = torch.autograd.grad(row_loss(student, teacher).sum(), student)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    else:
        assert torch.autograd.gradcheck(lambda logits: row_loss(logits, teacher), student)


@pytest.mark.parametrize("name", NAMES)
def test_upstream_gradient_is_per_row(name):
    student, teacher = random_logits()
    upstream = torch.tensor([3.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    loss = divergence(name)(student, teacher)
    (weighted,) = torch.autograd.grad((loss * upstream).sum(), student, retain_graph=True)
    (plain,) = torch.autograd.grad(loss.sum(), student)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(weighted, plain * upstream.unsqueeze(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_logits_give_exactly_no_loss_and_no_gradient(name, dtype):
    student, _ = random_logits(rows=5, vocab=1000, scale=8.0)
    student = student.detach().to(dtype).requires_grad_()
    loss = divergence(name, jsd_beta=0.1, temperature=2.0)(student, student.detach().clone())
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 5
    assert student.grad.count_nonzero() == 0  # NaN counts as nonzero


@pytest.mark.parametrize("name", NAMES)
def test_columns_masked_on_both_sides_have_no_effect(name):
    student, teacher = random_logits(dtype=torch.float32)
    loss = divergence(name)(student, teacher)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    masked = torch.full((4, 3), -math.inf)
    wide_student = torch.cat([student.detach(), masked], 1).requires_grad_()
    wide_loss = divergence(name)(wide_student, torch.cat([teacher, masked], 1))
    (wide_gradient,) = torch.autograd.grad(wide_loss.sum(), wide_student)
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_gradient[:, :11], gradient)
    assert wide_gradient[:, 11:].count_nonzero() == 0


@pytest.mark.parametrize("name", NAMES)
def test_logits_far_apart_stay_finite(name):
    student = torch.tensor([[300.0, 0.0, -200.0], [0.0, 90.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0, 300.0], [95.0, 0.0, 0.0]])
    loss = divergence(name, jsd_beta=0.3)(student, teacher)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss > 0.5).all()
    assert student.grad.isfinite().all()
    bounds = {
        "jensen_shannon": math.log(2),
        "generalised_jsd": -0.3 * math.log(0.3) - 0.7 * math.log(0.7),
        "skewed_forward": -math.log(0.1),
        "skewed_reverse": -math.log(0.1),
        "total_variation": 1.0,
    }
    if name in bounds:
        assert loss.tolist() == pytest.approx([bounds[name]] * 2, rel=1e-5)
    if name == "forward":
        assert loss.tolist() == pytest.approx([500.0, 90.0])


@pytest.mark.parametrize("name", NAMES)
def test_small_differences_keep_their_digits_in_float32(name):
    student, _ = random_logits(rows=3, vocab=500, dtype=torch.float64)
    noise = torch.randn(student.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    teacher = student.detach() + 1e-2 * noise
    low = divergence(name)(student.detach().float(), teacher.float())
    assert low.dtype == torch.float32
    # The value is about 5e-5; a sum of float32 probabilities alone carries an error near 1e-7.
    torch.testing.assert_close(low.double(), divergence(name)(student.detach(), teacher), rtol=2e-2, atol=1e-7)


def test_forward_means_teacher_to_student():
    certain, uniform = torch.tensor([[30.0, 0.0]]), torch.zeros(1, 2)
    assert divergences.forward_kl(uniform, certain).item() == pytest.approx(math.log(2))
    assert divergences.reverse_kl(certain, uniform).item() == pytest.approx(math.log(2))
    assert divergences.forward_kl(certain, uniform).item() == pytest.approx(15 - math.log(2))


def test_low_precision_logits_give_float32_losses_and_teacher_gets_no_gradient():
    student, teacher = random_logits(dtype=torch.float32)
    student = student.detach().bfloat16().requires_grad_()
    teacher = teacher.bfloat16().requires_grad_()
    loss = divergences.reverse_kl(student, teacher)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    assert student.grad.count_nonzero() > 0
    assert teacher.grad is None


def test_no_temperature_squared_factor():
    student, teacher = random_logits()
    warm = divergence("forward", temperature=4.0)(student, teacher)
    torch.testing.assert_close(warm, divergence("forward")(student / 4, teacher / 4))


@pytest.mark.parametrize("name", ["skewed_forward", "skewed_reverse", "generalised_jsd"])
@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_out_of_range_is_refused(name, share):
    with pytest.raises(ValueError, match="beta" if name == "generalised_jsd" else "skew"):
        divergence(name, skew=share, jsd_beta=share)(*random_logits())


def test_jsd_beta_is_the_teachers_share():
    certain, uniform = torch.tensor([[40.0, 0.0]]), torch.zeros(1, 2)  # the teacher is certain, the student is not
    # m = beta (1, 0) + (1 - beta) (1/2, 1/2), so m_0 = (1 + beta) / 2 and m_1 = (1 - beta) / 2.
    beta = 0.2
    to_mixture = 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)
    expected = -beta * math.log(0.6) + (1 - beta) * to_mixture
    assert divergences.generalised_jsd(uniform, certain, beta=beta).item() == pytest.approx(expected)


def test_jsd_tends_to_the_two_kls():
    student, teacher = random_logits(scale=1.0)
    student, share = student.detach(), 1e-5
    near_forward = divergences.generalised_jsd(student, teacher, beta=share) / share
    near_reverse = divergences.generalised_jsd(student, teacher, beta=1 - share) / share
    torch.testing.assert_close(near_forward, divergences.forward_kl(student, teacher), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(near_reverse, divergences.reverse_kl(student, teacher), rtol=1e-3, atol=0.0)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="forwards"):
        divergence("forwards")


def test_inputs_are_left_alone():
    student, teacher = random_logits(dtype=torch.float32)
    copies = student.detach().clone(), teacher.clone()
    for name in NAMES:
        divergence(name)(student, teacher).sum().backward()
    assert torch.equal(student.detach(), copies[0])
    assert torch.equal(teacher, copies[1])


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "case_divergences_same_vocab.safetensors")
    scalars = json.loads((GOLDEN / "case_divergences_same_vocab.json").read_text())["scalars"]
    return tensors, scalars


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_values_of_the_published_code(golden, name, setting):
    tensors, scalars = golden
    temperature, teacher_temperature = SETTINGS[setting]
    student = tensors["in.student_logits"].flatten(0, 1)
    teacher = tensors["in.teacher_logits"].flatten(0, 1)
    supervised = tensors["in.labels"].flatten() != -100
    if name == "adaptive" and setting != "T1":
        # The published code divides by the temperatures a second time inside the two KLs.
        loss = twice_tempered_adaptive(student, teacher, temperature, teacher_temperature)
    else:
        loss = divergence(name, temperature=temperature, teacher_temperature=teacher_temperature)(student, teacher)
    key = f"{GOLDEN_NAMES[name]}.{setting}"
    torch.testing.assert_close(
        loss, tensors[f"out.{key}.per_position"].flatten(), rtol=2e-5, atol=2e-6, check_dtype=False
    )
    assert loss[supervised].sum().item() == pytest.approx(scalars[f"{key}.sum"], rel=2e-5)


@pytest.mark.parametrize("name", [name for name in GOLDEN_NAMES if name != "adaptive"])
def test_gradients_of_the_published_code(golden, name):
    tensors, _ = golden
    student = tensors["in.student_logits"].clone().requires_grad_()
    loss = divergence(name, temperature=2.0)(student.flatten(0, 1), tensors["in.teacher_logits"].flatten(0, 1))
    loss[tensors["in.labels"].flatten() != -100].sum().backward()
    expected = tensors[f"grad.{GOLDEN_NAMES[name]}.T2"]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(student.grad, expected, rtol=2e-4, atol=5e-6)


def test_adaptive_gradient_of_the_published_code(golden):
    tensors, _ = golden
    student = tensors["in.student_logits"].flatten(0, 1).clone().requires_grad_()
    teacher = tensors["in.teacher_logits"].flatten(0, 1)
    weights = torch.tensor(
        [
            adaptive_weights(softmax(s, 2.0), softmax(t, 2.0), 0.5)
            for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True)
        ]
    )
    head, tail = (weights / weights.sum(1, keepdim=True)).unbind(1)
    forward = divergences.forward_kl(student, teacher, temperature=4.0)
    loss = head * forward + tail * divergences.reverse_kl(student, teacher, temperature=4.0)
    loss[tensors["in.labels"].flatten() != -100].sum().backward()
    expected = tensors["grad.adaptive_kl.T2"].flatten(0, 1)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(student.grad, expected, rtol=2e-4, atol=5e-6)


def twice_tempered_adaptive(student, teacher, temperature, teacher_temperature):
    teacher_scale = temperature * teacher_temperature
    values = []
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        head, tail = adaptive_weights(softmax(s, temperature), softmax(t, teacher_scale), 0.5)
        p, q = softmax(s, temperature**2), softmax(t, teacher_scale**2)
        values.append((head * kl(q, p) + tail * kl(p, q)) / (head + tail))
    return torch.tensor(values)
