"""Batched generation against calling ``generate`` prompt by prompt, in float32 and bfloat16.

    python benchmarks/generation.py [--student DIR --data test.jsonl]

Greedy, with the same prompts and the same limit; both use a key-value cache and stop at the end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

import material
from harness import Bar, Row, interleaved, parse, parser, report
from vocabridge.evaluation.engine import GenerationSettings, OutputTokens
from vocabridge.evaluation.generation import TransformersEngine, inference
from vocabridge.models.loading import load_model, load_tokenizer, vocabulary_size
from vocabridge.models.spec import Dtype, ModelSpec
from vocabridge.prompts import PromptRenderer

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both ways in both types."""
    options = parser("generation", __doc__)
    material.add_pair_options(options)
    options.add_argument("--rows", type=int, default=32)
    options.add_argument("--bytes", type=int, default=120, help="of each prompt where --data is not given")
    options.add_argument("--max-new-tokens", type=int, default=32)
    options.add_argument("--batch-size", type=int, default=16)
    arguments = parse(options, argv)
    if arguments.smoke:
        arguments.rows, arguments.max_new_tokens = 4, 4
    models = material.find_pair(arguments)
    prompts = material.examples(arguments, arguments.rows, num_bytes=arguments.bytes)
    tokenizer = load_tokenizer(ModelSpec(model=models.student))
    renderer = PromptRenderer(tokenizer, "plain")
    settings = GenerationSettings(
        max_new_tokens=arguments.max_new_tokens, temperature=0, batch_size=arguments.batch_size
    )
    prompt_ids = [renderer(example) for example in prompts]
    size = vocabulary_size(tokenizer)
    runs: dict[str, Callable[[], object]] = {}
    generators: dict[str, Generator] = {}
    for dtype in DTYPES:
        model = load_model(ModelSpec(model=models.student, dtype=dtype, device="cpu"))
        generators[dtype] = Generator(model, prompt_ids, settings, renderer.end_token_id, size)
        runs |= {f"plain {dtype}": generators[dtype].plain, f"batched {dtype}": generators[dtype].batched}
    timings = interleaved(runs, repeats=arguments.repeats)
    baseline = timings["plain float32"].median
    rows = []
    for dtype in DTYPES:
        generator = generators[dtype]
        for name, tokens in generator.new_tokens.items():
            seconds = timings[f"{name} {dtype}"].median
            rows.append(_row(name, dtype, tokens, seconds, timings[f"plain {dtype}"].median, baseline))
    bars = [
        Bar(f"generation, {row['dtype']}: batched / plain", row["speed / plain"], 2, at_most=False)
        for row in rows
        if row["how"] == "batched"
    ]
    facts = {"prompts": len(prompt_ids), "max_new_tokens": arguments.max_new_tokens, "batch": arguments.batch_size}
    report(arguments, {"generation": rows}, settings=models.facts() | facts, bars=[] if models.is_stand_in else bars)


def _row(name: str, dtype: str, tokens: int, seconds: float, plain: float, baseline: float) -> Row:
    return {
        "how": name,
        "dtype": dtype,
        "new tokens": tokens,
        "tokens/s": tokens / seconds,
        "speed / plain": plain / seconds,
        "speed / plain float32": baseline / seconds,
    }


@dataclass(frozen=True, slots=True, eq=False)
class Generator:
    """One model with the prompts that it answers; how many tokens it gave is kept in ``new_tokens``."""

    model: PreTrainedModel
    prompts: list[list[int]]
    settings: GenerationSettings
    end_token_id: int
    vocab_size: int
    new_tokens: dict[str, int] = field(default_factory=dict)

    def batched(self) -> None:
        """As ``vocabridge evaluate`` does it."""
        engine = TransformersEngine(self.model, self.settings, OutputTokens((self.end_token_id,), self.vocab_size))
        total = 0
        for indices in engine.batches([len(prompt) for prompt in self.prompts]):
            found = engine.generate(self.prompts, indices=indices, seed=0)
            total += sum(len(generation.token_ids) + generation.finished for generation in found)
        self.new_tokens["batched"] = total

    def plain(self) -> None:
        """One prompt after the other."""
        config = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            eos_token_id=self.end_token_id,
            pad_token_id=self.end_token_id,
        )
        total = 0
        generate: Any = self.model.generate
        with inference(self.model):
            for prompt in self.prompts:
                input_ids = torch.tensor([prompt])
                mask = torch.ones_like(input_ids)
                output = generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
                total += output.shape[1] - len(prompt)
        self.new_tokens["plain"] = total


if __name__ == "__main__":
    main()
