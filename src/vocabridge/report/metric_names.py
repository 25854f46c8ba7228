"""What logged quantities are called on the page, in which unit, and which section shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["loss", "stability", "distance", "other", "nowhere"]

_MAIN = ("loss", "eval_loss", "cross_entropy", "student_accuracy")
_STABILITY = (
    "discriminator_query_accuracy",
    "discriminator_key_accuracy",
    "query_gradient_ratio",
    "query_gradient_norm_kd",
    "query_gradient_norm_matching",
    "grad_norm",
)
_NOWHERE = ("epoch", "total_flos", "num_input_tokens_seen")
_LOG_SCALE = ("query_gradient_ratio", "query_gradient_norm_kd", "query_gradient_norm_matching", "grad_norm")
_SHARES = ("accuracy", "coverage", "in_chunk", "agreement", "share")
_NATS = ("cross_entropy", "divergence", "entropy", "log_likelihood_gap", "gan_queries", "gan_keys")
_BANDWIDTH_FACTORS = ("0.25", "0.5", "1", "2", "4")  # those of the losses, whose module imports torch
_WORDS = {
    "loss": "Total loss",
    "eval_loss": "Validation loss",
    "cross_entropy": "Student cross-entropy",
    "student_accuracy": "Student accuracy",
    "grad_norm": "Gradient norm",
    "discriminator_query_accuracy": "Discriminator accuracy on queries",
    "discriminator_key_accuracy": "Discriminator accuracy on keys",
    "query_gradient_ratio": "Query gradient norm, matching / KD",
    "query_gradient_norm_kd": "Query gradient norm of the KD loss",
    "query_gradient_norm_matching": "Query gradient norm of the matching loss",
    "mmd_squared": "MMD\u00b2, kernels of the pooled sample",
    **{f"mmd_squared_x{factor}": f"MMD\u00b2, kernel {factor} \u00d7 key distance" for factor in _BANDWIDTH_FACTORS},
    "sliced_wasserstein": "Sliced Wasserstein distance",
    "energy_distance": "Energy distance",
    "mean_cosine": "Cosine of the means",
    "two_sample_accuracy": "Two-sample classifier accuracy",
    "attention_in_chunk": "Attention inside the right chunk",
    "attention_top1_in_chunk": "Top-1 attention inside the right chunk",
}


@dataclass(frozen=True, slots=True)
class MetricName:
    """A logged quantity in words."""

    name: str
    title: str
    unit: str
    place: Place
    log_scale: bool


def metric_name(name: str) -> MetricName:
    """The words for a name in ``metrics.jsonl``; a term's name in front of it stays.

    >>> metric_name("dskd_cma/coverage").title
    'dskd_cma: coverage'
    >>> metric_name("probe/mmd_squared").place
    'distance'
    """
    prefix, _, last = name.rpartition("/")
    words = _WORDS.get(last, last.replace("_", " "))
    if prefix.endswith("loss"):
        words = f"Loss: {words}"
    term = prefix.removeprefix("probe").removesuffix("loss").strip("/")
    title = f"{term}: {words}" if term else words[0].upper() + words[1:]
    return MetricName(name, title, _unit(last, prefix), _place(prefix, last), last in _LOG_SCALE)


def _unit(last: str, prefix: str) -> str:
    if last.endswith(_SHARES):
        return "share"
    if last.endswith(_NATS) or last in ("loss", "eval_loss") or prefix.endswith("loss"):
        return "nats"
    units = {"learning_rate": "learning rate", "mean_cosine": "cosine", "query_gradient_ratio": "ratio"}
    if last in units:
        return units[last]
    if "norm" in last:
        return "norm"
    return "distance" if prefix.startswith("probe") else "value"


def _place(prefix: str, last: str) -> Place:
    if (
        last in _NOWHERE
        or last.startswith(("train_", "init_", "before_init_"))
        or last.endswith(("_runtime", "_per_second"))
    ):
        return "nowhere"
    if prefix.startswith("probe"):
        return "distance"
    if last in _STABILITY:
        return "stability"
    return "loss" if last in _MAIN or prefix.endswith("loss") else "other"
