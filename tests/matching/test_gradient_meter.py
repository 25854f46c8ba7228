import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vocabridge.matching.gradient_meter import GradientMeter

F_IN, F_OUT = 6, 4


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("num_rows", [1, 3, 200])
def test_norm_is_that_of_the_weights_gradient_and_no_larger_tensor_is_made(num_rows):
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(F_IN, F_OUT), torch.randn(num_rows, F_IN)
    meter = GradientMeter()
    meter.enabled = True
    output = meter.watch(linear(inputs), inputs, "loss")
    with LargestTensor() as seen:
        output.square().sum().backward()
    assert seen.numel <= num_rows * F_IN + F_IN * F_OUT
    assert meter.norms() == pytest.approx({"loss": float(linear.weight.grad.norm())}, rel=1e-5)
    assert meter.norms() == {}
