"""A model's responses to all prompts of a file, written as they come and resumed after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.errors import UserError
from vocabridge.evaluation.engine import Generation, GenerationEngine, GenerationSettings, OutputTokens
from vocabridge.evaluation.generation import TransformersEngine
from vocabridge.evaluation.run_folder import PredictionFile, Record
from vocabridge.evaluation.vllm_engine import VllmEngine, VllmModel
from vocabridge.models.loading import vocabulary_size
from vocabridge.prompts import PromptRenderer, Template
from vocabridge.ranks import Ranks
from vocabridge.text import Example

MakeRecord = Callable[[Example, Generation, str], Record]
"""What is kept of one response: ``(example, generation, its text) -> record`` without ``index``."""


@dataclass(frozen=True, slots=True)
class Responder:
    """How prompts become token ids and token ids become text; an engine does what lies between."""

    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    settings: GenerationSettings
    context: int
    """Most tokens of prompt and response together."""

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        settings: GenerationSettings,
        template: Template,
    ) -> Responder:
        """Check that the responses fit into what the model reads.

        Args:
            config: the model's.
            tokenizer: the model's.
            settings: how responses are generated.
            template: how prompts are rendered.

        Raises:
            UserError: ``max_new_tokens`` leaves no room for a prompt.
        """
        context = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
        if settings.max_new_tokens >= context:
            raise UserError(
                f"max_new_tokens is {settings.max_new_tokens}, but the model reads at most {context} "
                "tokens, prompt included; lower it."
            )
        return cls(tokenizer, PromptRenderer(tokenizer, template), settings, context)

    @property
    def tokens(self) -> OutputTokens:
        """What an engine may generate."""
        ends = {self.renderer.end_token_id, self.tokenizer.eos_token_id}
        return OutputTokens(tuple(sorted(ends)), vocabulary_size(self.tokenizer))

    @property
    def room(self) -> int:
        """Most tokens of a prompt; a longer one loses its beginning."""
        return self.context - self.settings.max_new_tokens

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids; of a prompt that is too long the end, which says that an answer is due."""
        return [self.renderer(example)[-self.room :] for example in examples]

    def transformers_engine(self, model: PreTrainedModel) -> TransformersEngine:
        """An engine around a model in memory."""
        return TransformersEngine(model, self.settings, self.tokens)

    def vllm_engine(self, model: VllmModel, examples: Sequence[Example]) -> VllmEngine:
        """An engine that has room for these examples."""
        longest = max(map(len, self.prompts(examples)))
        return VllmEngine(
            model,
            settings=self.settings,
            tokens=self.tokens,
            max_length=longest + self.settings.max_new_tokens,
        )

    def respond(
        self,
        examples: Sequence[Example],
        engine: GenerationEngine,
        *,
        seed: int,
        file: PredictionFile,
        make_record: MakeRecord,
        progress: Progress,
        title: str,
        ranks: Ranks | None = None,
    ) -> list[Record]:
        """Records of all examples, in order; those that an earlier run wrote are kept.

        With several processes the first one reads, writes and returns the records, and the others return none.

        Args:
            examples: their prompts are answered.
            engine: runs the model.
            seed: of the sampling.
            file: where the records go, batch by batch.
            make_record: turns a response into what is kept.
            progress: shows a bar for this file.
            title: of the bar.
            ranks: the processes that share the batches.
        """
        ranks = ranks or Ranks()
        prompts = self.prompts(examples)
        batches = engine.batches([len(prompt) for prompt in prompts])

        def answer(place: int) -> list[Record]:
            # A batch that was torn is generated whole: the same batch gives the same rounding, hence the same text.
            return [
                {"index": generation.index}
                | make_record(examples[generation.index], generation, self._text(generation))
                for generation in engine.generate(prompts, indices=batches[place], seed=seed)
            ]

        records = file.load() if ranks.is_first else {}
        open_places = ranks.on_first(
            lambda: [place for place, indices in enumerate(batches) if not records.keys() >= set(indices)]
        )
        task = progress.add_task(title, total=len(examples), completed=len(records))
        for _, answers in ranks.spread(open_places, answer):
            new = [record for record in answers if record["index"] not in records]
            file.append(new)
            records |= {record["index"]: record for record in new}
            progress.advance(task, len(new))
        if not ranks.is_first:
            return []
        file.finish(records)
        return [records[index] for index in range(len(examples))]

    def _text(self, generation: Generation) -> str:
        text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def generation_progress(ranks: Ranks) -> Progress:
    """Bars with counts and the time that is left, on the standard error of the first process."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not ranks.is_first)
