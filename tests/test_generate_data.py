"""The teacher's answers as training rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import fake_vllm
from tiny_pair import ROWS, student_model
from vocabridge import cli
from vocabridge.errors import UserError
from vocabridge.evaluation.engine import GenerationSettings
from vocabridge.evaluation.generation import TransformersEngine
from vocabridge.generate_data import generate_data
from vocabridge.models.spec import ModelSpec
from vocabridge.text import parse_row, read_examples, row_with_response

SAMPLED = GenerationSettings(max_new_tokens=24, temperature=1.0, batch_size=3)


@pytest.fixture
def teacher(tmp_path, tiny_bpe_tokenizer):
    """A model with an even chance for every token: its answers end, some of them."""
    model = student_model(tiny_bpe_tokenizer, tied=False)
    model.lm_head.weight.data.mul_(0.1)
    model.lm_head.weight.data[tiny_bpe_tokenizer.eos_token_id] *= 60
    model.double().save_pretrained(tmp_path / "teacher")
    tiny_bpe_tokenizer.save_pretrained(tmp_path / "teacher")
    return ModelSpec(model=str(tmp_path / "teacher"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return [str(path)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say hi.\n", "output": "no"},
        {"prompt": "Say hi.", "output": "no"},
        {"instruction": "Add.", "input": "1 2", "output": "no"},
        {"prompt": "Custom: Add.", "instruction": "Add.", "output": ["no", "nein"]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "no"},
            ]
        },
    ],
)
def test_a_row_with_another_response_keeps_its_prompt_in_both_forms(row):
    before = parse_row(row, "here")
    after = parse_row(row_with_response(before, "yes"), "here")
    assert (after.prompt, after.messages, after.references) == (before.prompt, before.messages, ("yes",))


def test_rows_are_the_finished_answers_of_every_seed(teacher, prompts, tmp_path):
    output = tmp_path / "generated.jsonl"
    result = generate_data(teacher, prompts, output, seeds=(1, 2), settings=SAMPLED)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert result.num_rows == len(rows)
    assert result.num_rows + result.num_empty + result.num_unfinished == 2 * len(ROWS)
    assert result.num_unfinished > 0, "the test needs an answer that is cut off"
    assert {row["seed"] for row in rows} == {1, 2}
    originals = {example.source: example for example in read_examples(prompts[0])}
    for row, example in zip(rows, read_examples(str(output)), strict=True):
        original = originals[row["source"]]
        assert (example.prompt, example.messages) == (original.prompt, original.messages)
        assert example.response.strip()
    assert not list(tmp_path.glob("*.generation"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_generation_goes_on_to_the_same_rows(teacher, prompts, tmp_path, monkeypatch, overwrite):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    generate_data(teacher, prompts, whole, seeds=(1, 2), settings=SAMPLED)
    calls = []

    def stop_at_fourth(*args, **kwargs):
        calls.append(kwargs["indices"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return bucket(*args, **kwargs)

    bucket = TransformersEngine.generate
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", stop_at_fourth)
        with pytest.raises(KeyboardInterrupt):
            generate_data(teacher, prompts, resumed, seeds=(1, 2), settings=SAMPLED, overwrite=overwrite)
    assert not resumed.exists()
    again = []
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda *args, **kwargs: again.append(1) or bucket(*args, **kwargs)
    )
    generate_data(teacher, prompts, resumed, seeds=(1, 2), settings=SAMPLED, overwrite=overwrite)
    assert resumed.read_bytes() == whole.read_bytes()
    assert len(again) == 3  # of six buckets, three were done


def test_other_settings_do_not_go_on_from_answers_that_are_there(teacher, prompts, tmp_path, monkeypatch):
    output = tmp_path / "generated.jsonl"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", stop)
        with pytest.raises(KeyboardInterrupt):
            generate_data(teacher, prompts, output, settings=SAMPLED)
    other = GenerationSettings(max_new_tokens=24, temperature=0.5, batch_size=3)
    with pytest.raises(UserError, match="temperature"):
        generate_data(teacher, prompts, output, settings=other)
    assert generate_data(teacher, prompts, output, settings=other, overwrite=True).num_rows > 0


def test_mistakes_are_told_before_anything_is_generated(teacher, prompts, tmp_path):
    output = tmp_path / "there.jsonl"
    output.write_text("mine\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"there\.jsonl exists"):
        generate_data(teacher, prompts, output, settings=SAMPLED)
    with pytest.raises(UserError, match="does not exist"):
        generate_data(teacher, prompts, tmp_path / "no" / "x.jsonl", settings=SAMPLED)
    greedy = GenerationSettings(temperature=0)
    with pytest.raises(UserError, match="several seeds with temperature 0"):
        generate_data(teacher, prompts, tmp_path / "x.jsonl", seeds=(1, 2), settings=greedy)
    assert output.read_text(encoding="utf-8") == "mine\n"


def test_no_usable_answer_is_an_error(teacher, prompts, tmp_path):
    settings = GenerationSettings(max_new_tokens=1, temperature=0)
    with pytest.raises(UserError, match=r"gave no usable answer: .* cut off at 1 tokens"):
        generate_data(teacher, prompts, tmp_path / "x.jsonl", settings=settings)
    assert not (tmp_path / "x.jsonl").exists()
    # The message advises another length.
    assert generate_data(teacher, prompts, tmp_path / "x.jsonl", settings=SAMPLED).num_rows > 0


def test_vllm_answers_as_transformers_does(teacher, prompts, tmp_path, monkeypatch):
    calls = fake_vllm.install(monkeypatch)
    greedy = GenerationSettings(max_new_tokens=24, temperature=0)
    teacher = ModelSpec(model=teacher.model, dtype="float32")
    plain, served = tmp_path / "plain.jsonl", tmp_path / "served.jsonl"
    generate_data(teacher, prompts, plain, settings=greedy)
    generate_data(teacher, prompts, served, settings=greedy, engine="vllm")
    assert served.read_bytes() == plain.read_bytes()
    assert calls.batches == [len(ROWS)]
    assert (calls.models[0]["model"], calls.models[0]["dtype"]) == (teacher.model, "float32")
    sampled = generate_data(teacher, prompts, tmp_path / "x.jsonl", seeds=(1, 2), settings=SAMPLED, engine="vllm")
    assert sampled.num_rows + sampled.num_empty + sampled.num_unfinished == 2 * len(ROWS)
    seeds = [params.seed for params in calls.params[len(ROWS) :]]
    assert len(set(seeds)) == 2 * len(ROWS)


def test_answers_of_one_engine_do_not_go_on_with_the_other(teacher, prompts, tmp_path, monkeypatch):
    calls = fake_vllm.install(monkeypatch)
    teacher = ModelSpec(model=teacher.model, dtype="float32")
    calls.finish_reason = "abort"
    with pytest.raises(UserError, match="gave up"):
        generate_data(teacher, prompts, tmp_path / "x.jsonl", settings=SAMPLED, engine="vllm")
    with pytest.raises(UserError, match=r"engine \(vllm there"):
        generate_data(teacher, prompts, tmp_path / "x.jsonl", settings=SAMPLED)


def test_vllm_must_be_installed(teacher, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # also where it is
    with pytest.raises(UserError, match="needs the package vllm; install it"):
        generate_data(teacher, prompts, tmp_path / "x.jsonl", settings=SAMPLED, engine="vllm")


def test_command_line(teacher, prompts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "generated.jsonl"
    words = ["generate-data", teacher.model, "--data", prompts[0], "--output", str(output)]
    words += ["--seeds", "1", "2", "--temperature", "1", "--max-new-tokens", "24", "--limit", "4"]
    monkeypatch.setattr(sys, "argv", ["vocabridge", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"{len(output.read_text(encoding='utf-8').splitlines())} rows;" in out
    assert Path(output).is_file()
