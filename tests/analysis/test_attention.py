"""The attention of a finished run against plain loops over its saved weights, and against what the trainer logged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vocabridge.alignment import token_bytes
from vocabridge.analysis.attention import ATTENTION_NAMES, AttentionReader, ExampleAttention
from vocabridge.analysis.finished_run import FinishedRun, attention_objectives, load_finished_run
from vocabridge.analysis.probe import ProbeSource, probe
from vocabridge.pairs import TokenizedPair, TokenizedSide, tokenize_examples
from vocabridge.text import read_examples

FinishedFolder = Callable[[str], Path]


def loaded(folder: Path) -> tuple[FinishedRun, list[TokenizedPair], list[ExampleAttention]]:
    data = str(folder.parent / "data.jsonl")
    run = load_finished_run(folder, data)
    pairs = list(tokenize_examples(read_examples(data), run.pair_tokenizer))
    return run, pairs, list(AttentionReader(run).examples(pairs))


def embedding(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings()


def supervised(side: TokenizedSide) -> list[tuple[int, int]]:
    """Token read and token predicted of each supervised position."""
    return [(side.input_ids[t - 1], label) for t, label in enumerate(side.labels) if label != -100]


def unit(vector: Tensor, centre: Tensor) -> Tensor:
    return (vector - centre) / (vector - centre).norm()


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


@torch.no_grad()
def slow_closed_form(folder: Path, pair: TokenizedPair, *, position_weight: float) -> list[list[float]]:
    state = load_file(folder / "objective.safetensors")
    student, teacher = embedding(folder).weight, embedding(folder.parent / "teacher").weight
    queries, keys = supervised(pair.student), supervised(pair.teacher)
    rows = []
    for i, (read, label) in enumerate(queries, start=1):
        vector = torch.cat([unit(student[token], state["student_center"]) for token in (read, label)])
        query = state["query_projector.weight"] @ vector + state["query_projector.bias"]
        scores = []
        for j, tokens in enumerate(keys, start=1):
            key = torch.cat([unit(teacher[token], state["teacher_center"]) for token in tokens])
            distance = abs(j / len(keys) - i / len(queries))
            scores.append(20 * (float(query @ key) - position_weight * distance))
        rows.append(softmax(scores))
    return rows


@torch.no_grad()
def slow_random(folder: Path, pair: TokenizedPair) -> list[list[float]]:
    state = load_file(folder / "objective.safetensors")
    student, teacher = embedding(folder).weight, embedding(folder.parent / "teacher").weight
    keys = torch.stack([torch.cat([teacher[read], teacher[label]]) for read, label in supervised(pair.teacher)])
    keys = keys / keys.std()
    rows = []
    for read, label in supervised(pair.student):
        query = state["query_projector.weight"] @ torch.cat([student[read], student[label]])
        query = query + state["query_projector.bias"]
        rows.append(softmax([float(query @ key) / keys.shape[1] ** 0.5 for key in keys]))
    return rows


def test_after_training_closed_form(finished_run: FinishedFolder) -> None:
    folder = finished_run("dskd_cma")
    _, pairs, examples = loaded(folder)
    for index in (2, 4):
        expected = slow_closed_form(folder, pairs[index], position_weight=0.2)
        np.testing.assert_allclose(examples[index].weights["after"], expected, atol=2e-5)
        assert np.abs(examples[index].weights["before"] - expected).max() > 0.1, "training changed nothing"


def test_after_training_random_start(finished_run: FinishedFolder) -> None:
    folder = finished_run("dskd_cla")
    _, pairs, examples = loaded(folder)
    expected = slow_random(folder, pairs[3])
    np.testing.assert_allclose(examples[3].weights["after"], expected, atol=2e-5)
    assert np.abs(examples[3].weights["before"] - expected).max() > 0.01


@pytest.mark.parametrize("name", ["dskd_cma", "lora"])
def test_probe_is_what_the_trainer_logged_before_and_after(finished_run: FinishedFolder, name: str) -> None:
    folder = finished_run(name)
    _, _, examples = loaded(folder)
    report = probe(examples, ProbeSource("", "", ""))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: line for line in lines if "probe/attention_in_chunk" in line}
    for step, stage in ((0, "before"), (6, "after")):
        measures = report.result(stage).measures
        assert measures["mass_in_chunk"].mean == pytest.approx(logged[step]["probe/attention_in_chunk"], abs=1e-5)
        top = logged[step]["probe/attention_top1_in_chunk"]
        assert measures["top1_in_chunk"].mean == pytest.approx(top, abs=1e-6)
    assert logged[0]["probe/attention_in_chunk"] != pytest.approx(logged[6]["probe/attention_in_chunk"], abs=0.01)


@pytest.mark.parametrize("objective", ["dskd_cma", "dskd_cla"])
def test_random_parts_start_as_in_the_run(finished_run: FinishedFolder, objective: str) -> None:
    """A part that no step has changed (no gradient reaches it at these weights) would be equal: none is, but close."""
    run, _, _ = loaded(finished_run(objective))
    before, after = run.before.attention.query_projector, run.after.attention.query_projector
    moved = (before.weight - after.weight).abs()
    assert 0 < moved.mean() < 6 * 0.02, "further than 6 steps of Adam at 0.02 can go"
    assert moved.max() <= 6 * 0.02 * 1.5


def test_a_composition_starts_as_in_the_run(finished_run: FinishedFolder) -> None:
    run, _, examples = loaded(finished_run("composed"))
    moved = (run.before.attention.query_projector.weight - run.after.attention.query_projector.weight).abs()
    assert 0 < moved.max() <= 6 * 0.02 * 1.5
    assert run.recipe.objective.name == "cross_entropy + uld + dskd_cla"
    assert set(examples[0].weights) == set(ATTENTION_NAMES)


def test_bounds(finished_run: FinishedFolder) -> None:
    folder = finished_run("dskd_cma")
    run, _, examples = loaded(folder)
    pieces = [token_bytes(side.tokenizer) for side in (run.pair_tokenizer.student, run.pair_tokenizer.teacher)]
    num_exact = num_other = 0
    for example in examples:
        student, teacher = example.student, example.teacher
        num_keys = len(teacher.labels)
        np.testing.assert_allclose(example.weights["uniform"], 1 / num_keys, rtol=1e-6)
        for i, chunk in enumerate(student.chunk_ids.tolist()):
            inside = [j for j in range(num_keys) if teacher.chunk_ids[j] == chunk and chunk >= 0]
            mates = [k for k in range(len(student.labels)) if student.chunk_ids[k] == chunk]
            total = sum(example.weights["after"][i, j] for j in inside)
            for j in range(num_keys):
                is_in = j in inside
                assert example.weights["clp"][i, j] == pytest.approx(1 / len(inside) if is_in else 0, abs=1e-6)
                cla = example.weights["after"][i, j] / total if is_in else 0
                assert example.weights["cla"][i, j] == pytest.approx(cla, abs=1e-4)
                piece = pieces[0][student.labels[i]]
                same = piece is not None and piece == pieces[1][teacher.labels[j]]
                is_end = i == len(student.labels) - 1 and j == num_keys - 1
                same_place = is_in and len(mates) == len(inside) and i - mates[0] == j - inside[0]
                exact = float(same_place and (same or is_end))
                assert example.weights["eta"][i, j] == exact
                num_exact += int(exact)
            num_other += not example.weights["eta"][i].any()
    assert num_exact > 50
    assert num_other > 10


def test_examples_do_not_depend_on_their_batch(finished_run: FinishedFolder) -> None:
    run, pairs, examples = loaded(finished_run("dskd_cla"))
    (alone,) = AttentionReader(run).examples(pairs[5:6])
    for name in ATTENTION_NAMES:
        np.testing.assert_allclose(alone.weights[name], examples[5].weights[name], atol=1e-5)
    many = list(AttentionReader(run).examples([*pairs, *pairs, pairs[0]]))
    assert len(many) == 2 * len(pairs) + 1
    np.testing.assert_array_equal(many[-1].student.spans, pairs[0].student.spans)
    np.testing.assert_allclose(many[-1].weights["after"], examples[0].weights["after"], atol=1e-5)


def test_loading_leaves_the_random_state_alone(finished_run: FinishedFolder) -> None:
    folder = finished_run("dskd_cla")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_finished_run(folder, str(folder.parent / "data.jsonl"))
    assert torch.equal(torch.rand(3), expected)


def test_objectives_that_can_be_analysed() -> None:
    assert attention_objectives() == ["dskd_cla", "dskd_cma"]
