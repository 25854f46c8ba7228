"""How strongly each loss pulls a shared linear map: the norm of its gradient on the weight, from one backward pass."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor


class GradientMeter:
    """Measures ``|dL_name/dP|`` for several losses that use the output of one linear map ``P`` under different names.

    Every loss gets its own view of the output ``[N, F_out]``; a hook on the view sees that loss's gradient G alone.
    With the map's input X the weight's gradient is G^T X. Its Frobenius norm also follows from two [N, N] products; the
    smaller form is taken. Over several micro-batches the norms are averaged.
    """

    def __init__(self) -> None:
        self.enabled = False
        self._norms: dict[str, list[Tensor]] = defaultdict(list)

    def watch(self, output: Tensor, inputs: Tensor, name: str) -> Tensor:
        """A view of ``output [N, F_out]`` whose gradient is measured under ``name``; ``inputs [N, F_in]``."""
        if not (self.enabled and output.requires_grad):
            return output
        view = output.view_as(output)

        def measure(gradient: Tensor) -> None:
            self._norms[name].append(_product_norm(gradient.detach().float(), inputs.detach().float()))

        view.register_hook(measure)
        return view

    def norms(self) -> dict[str, float]:
        """Mean norm by name since the last call."""
        result = {name: float(sum(values) / len(values)) for name, values in self._norms.items()}
        self._norms.clear()
        return result


def _product_norm(g: Tensor, x: Tensor) -> Tensor:
    """Frobenius norm of ``g^T x`` for ``g [N, F_out]`` and ``x [N, F_in]``."""
    if len(g) ** 2 > g.shape[1] * x.shape[1]:
        return (g.T @ x).norm()
    return ((g @ g.T) * (x @ x.T)).sum().clamp(min=0).sqrt()
