"""A model's responses to all prompts of a file, written as they come and resumed after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..models.loading import vocabulary_size
from ..prompts import PromptRenderer, Template
from ..text import Example
from .generation import Generation, GenerationSettings, generate_bucket, length_buckets
from .run_folder import PredictionFile, Record

MakeRecord = Callable[[Example, Generation, str], Record]
"""What is kept of one response: ``(example, generation, its text) -> record`` without ``index``."""


@dataclass(frozen=True, slots=True)
class Responder:
    """A model with everything that is the same for all its responses."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    settings: GenerationSettings
    context: int
    """Most tokens of prompt and response together."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        template: Template,
    ) -> Responder:
        """Check that the responses fit into what the model reads.

        Raises:
            UserError: ``max_new_tokens`` leaves no room for a prompt.
        """
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        if settings.max_new_tokens >= context:
            raise UserError(
                f"max_new_tokens is {settings.max_new_tokens}, but the model reads at most {context} "
                "tokens, prompt included; lower it."
            )
        return cls(model, tokenizer, PromptRenderer(tokenizer, template), settings, context)

    @property
    def room(self) -> int:
        """Most tokens of a prompt; a longer one loses its beginning."""
        return self.context - self.settings.max_new_tokens

    def respond(
        self,
        examples: Sequence[Example],
        *,
        seed: int,
        file: PredictionFile,
        make_record: MakeRecord,
        progress: Progress,
        title: str,
    ) -> list[Record]:
        """Records of all examples, in order; those that an earlier run wrote are kept.

        Args:
            examples: their prompts are answered.
            seed: of the sampling.
            file: where the records go, bucket by bucket.
            make_record: turns a response into what is kept.
            progress: shows a bar for this file.
            title: of the bar.
        """
        prompts = [self.renderer(example)[-self.room :] for example in examples]  # its end says that an answer is due
        records = file.load()
        task = progress.add_task(title, total=len(examples), completed=len(records))
        eos_token_id = self.tokenizer.eos_token_id
        for indices in length_buckets([len(prompt) for prompt in prompts], self.settings.batch_size):
            if records.keys() >= set(indices):
                continue
            # A bucket that was torn is generated whole: the same batch gives the same rounding, hence the same text.
            generations = generate_bucket(
                self.model,
                prompts,
                indices=indices,
                settings=self.settings,
                seed=seed,
                end_token_ids=sorted({self.renderer.end_token_id, eos_token_id}),
                vocab_size=vocabulary_size(self.tokenizer),
            )
            new = [
                {"index": generation.index}
                | make_record(examples[generation.index], generation, self._text(generation))
                for generation in generations
                if generation.index not in records
            ]
            file.append(new)
            records |= {record["index"]: record for record in new}
            progress.advance(task, len(new))
        file.finish(records)
        return [records[index] for index in range(len(examples))]

    def _text(self, generation: Generation) -> str:
        text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def generation_progress() -> Progress:
    """Bars with counts and the time that is left, on standard error."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
