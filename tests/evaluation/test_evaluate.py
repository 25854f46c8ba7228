"""Whole evaluations of a tiny model: scores, files, interruption, guards."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_models import tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import vocabridge.evaluation.evaluate as evaluation
from vocabridge.errors import UserError
from vocabridge.evaluation.evaluate import evaluate, evaluate_model
from vocabridge.evaluation.generation import TransformersEngine
from vocabridge.evaluation.metrics import exact_match, rouge_l
from vocabridge.evaluation.results import EvaluationResult, results_table
from vocabridge.models.spec import ModelSpec

Run = Callable[..., EvaluationResult]

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "to", "that", "old", "house"]
DEV = [
    {"prompt": " ".join(WORDS[: 1 + row]) + "\n", "response": [" ".join(WORDS[row:]), " ".join(WORDS[: row + 2])]}
    for row in range(7)
]
OTHER = [{"prompt": f"{word}?\n", "response": word} for word in WORDS[:5]]
FILES = {"dev": DEV, "other": OTHER}


@pytest.fixture(scope="module")
def model(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_llama(len(tiny_bpe_tokenizer))


@pytest.fixture
def run(model: PreTrainedModel, tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> Run:
    """An evaluation in small batches, so that every file has several."""
    settings = {"files": FILES, "seeds": (10, 20), "max_new_tokens": 6, "batch_size": 3}

    def evaluation_into(output_dir: Path, **changes: Any) -> EvaluationResult:
        return evaluate(model, tiny_bpe_tokenizer, output_dir=output_dir, **{**settings, **changes})

    return evaluation_into


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scores_are_those_of_the_stored_predictions(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path)
    means = []
    for seed in (10, 20):
        lines = (tmp_path / "predictions" / f"dev.seed{seed}.jsonl").read_text("utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
        assert [record["prompt"] for record in records] == [row["prompt"] for row in DEV]
        assert [record["references"] for record in records] == [row["response"] for row in DEV]
        for record in records:
            assert record["rouge_l"] == rouge_l(record["prediction"], record["references"])
            assert record["exact_match"] == exact_match(record["prediction"], record["references"])
            assert record["source"].startswith("rows[")
        means.append(round(100 * statistics.fmean(record["rouge_l"] for record in records), 4))
    dev = result.files[0]
    assert [scores.rouge_l for scores in dev.seeds] == means
    assert means[0] > 0
    assert means[0] != means[1]
    assert dev.rouge_l.mean == pytest.approx(statistics.fmean(means))
    assert dev.rouge_l.std == pytest.approx(statistics.stdev(means))


def test_bits_of_every_row_add_up_to_those_of_the_file(run: Run, tmp_path: Path) -> None:
    dev = run(tmp_path).files[0]
    rows = [json.loads(line) for line in (tmp_path / "bits" / "dev.jsonl").read_text("utf-8").splitlines()]
    predictions = (tmp_path / "predictions" / "dev.seed10.jsonl").read_text("utf-8").splitlines()
    assert [row["source"] for row in rows] == [json.loads(line)["source"] for line in predictions]
    assert [row["num_bytes"] for row in rows] == [len(row["response"][0]) for row in DEV]
    assert sum(row["bits"] for row in rows) / sum(row["num_bytes"] for row in rows) == pytest.approx(dev.bits_per_byte)


def test_an_evaluation_from_before_rows_had_bits_goes_on(run: Run, tmp_path: Path) -> None:
    first = run(tmp_path)
    for path in (tmp_path / "bits").glob("*.jsonl"):
        path.unlink()
    assert run(tmp_path) == first


def test_bits_killed_between_rows_and_sums_are_computed_again(run: Run, tmp_path: Path) -> None:
    run(tmp_path)
    before = _files(tmp_path)
    (tmp_path / "bits" / "dev.json").unlink()
    (tmp_path / "bits" / "dev.jsonl").write_text("torn")
    run(tmp_path)
    assert _files(tmp_path) == before


def test_results_file_and_table_show_every_file_and_both_averages(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, files={**FILES, "third": OTHER[:3]})
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [file["name"] for file in stored["files"]] == ["dev", "other", "third"]
    assert stored["in_domain"]["files"] == ["dev"]
    assert stored["out_of_domain"]["files"] == ["other", "third"]
    expected = (result.files[1].bits_per_byte + result.files[2].bits_per_byte) / 2
    assert result.out_of_domain.bits_per_byte == pytest.approx(expected)
    per_seed = [
        (first.rouge_l + second.rouge_l) / 2
        for first, second in zip(result.files[1].seeds, result.files[2].seeds, strict=True)
    ]
    assert result.out_of_domain.rouge_l.std == pytest.approx(statistics.stdev(per_seed))
    console = Console(record=True, width=80)
    console.print(results_table(result))
    cells = [line.replace("\u2502", " ").split() for line in console.export_text().split("\n")]
    dev = result.files[0]
    assert ["dev", "in", "7", f"{dev.rouge_l.mean:.2f}", f"{dev.rouge_l.std:.2f}"] in [row[:5] for row in cells]
    assert [row[-1] for row in cells if row[:2] == ["average", "out"]] == [f"{expected:.4f}"]


@pytest.mark.parametrize("tear", [0, 25])
@pytest.mark.parametrize("survived", [0, 1, 4])
def test_a_killed_evaluation_resumes_to_identical_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int, tear: int
) -> None:
    run(tmp_path / "whole")
    calls = 0
    generate = TransformersEngine.generate

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > survived:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "results.json").exists()
    for partial in (tmp_path / "resumed").rglob("*.partial"):
        partial.write_bytes(partial.read_bytes()[: -tear or None])
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return generate(*args, **kwargs)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    run(tmp_path / "resumed")
    assert _files(tmp_path / "resumed") == _files(tmp_path / "whole")
    num_buckets = 2 * (3 + 2)
    torn_buckets = 1 if tear and survived else 0
    assert calls == num_buckets - survived + torn_buckets


def test_a_finished_evaluation_generates_nothing_and_further_seeds_only_add(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path)
    third = run(tmp_path / "alone", seeds=(30,))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is left to compute")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", refuse)
        patch.setattr(evaluation, "row_bits", refuse)
        assert run(tmp_path) == first
    more = run(tmp_path, seeds=(10, 20, 30))
    assert more.files[0].seeds == (*first.files[0].seeds, *third.files[0].seeds)


def test_another_setting_is_refused_until_overwritten(run: Run, tmp_path: Path) -> None:
    run(tmp_path)
    before = _files(tmp_path)
    with pytest.raises(UserError, match=r"temperature \(1\.0 there, 0\.5 now\).*--overwrite"):
        run(tmp_path, temperature=0.5)
    with pytest.raises(UserError, match="the data of 'dev'"):
        run(tmp_path, limit=3)
    assert _files(tmp_path) == before
    assert run(tmp_path, temperature=0.5, overwrite=True).settings.temperature == 0.5


def test_greedy_decoding_has_one_run_and_no_deviation(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, temperature=0.0)
    assert [scores.seed for scores in result.files[0].seeds] == [10]
    assert result.files[0].rouge_l.std is None
    assert result.out_of_domain.rouge_l.std is None


def test_a_prompt_beyond_the_context_keeps_its_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    generate = TransformersEngine.generate

    def spy(self: Any, prompts: list[list[int]], **kwargs: Any) -> Any:
        seen.extend(prompts)
        return generate(self, prompts, **kwargs)

    monkeypatch.setattr(TransformersEngine, "generate", spy)
    long = [{"prompt": "word " * 300 + "end\n", "response": "a"}, {"prompt": "short\n", "response": "b"}]
    result = run(tmp_path, files={"dev": long}, seeds=(1,))
    assert result.files[0].num_cut_prompts == 1
    assert result.files[0].reference_bits.num_skipped == 1
    assert len(seen[0]) == 256 - 6


def test_more_new_tokens_than_context_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads at most 256 tokens"):
        run(tmp_path / "x", max_new_tokens=256)
    assert not (tmp_path / "x").exists()


def test_a_saved_model_scores_as_the_model_in_memory(
    run: Run, tmp_path: Path, model: PreTrainedModel, tiny_bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, data = tmp_path / "student", tmp_path / "dev.jsonl"
    model.save_pretrained(folder)
    tiny_bpe_tokenizer.save_pretrained(folder)
    data.write_text("".join(json.dumps(row) + "\n" for row in OTHER))
    spec = ModelSpec(model=str(folder), device="cpu")
    result = evaluate_model(spec, [str(data)], output_dir=folder / "evaluation", seeds=[3], max_new_tokens=4)
    in_memory = run(tmp_path / "direct", files={"dev": OTHER}, seeds=[3], max_new_tokens=4, batch_size=16)
    assert result.files == in_memory.files
    assert (folder / "evaluation" / "results.json").is_file()


def test_data_is_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        evaluate_model(
            ModelSpec(model=str(tmp_path / "no-model")), [str(tmp_path / "dev.jsonl")], output_dir=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
