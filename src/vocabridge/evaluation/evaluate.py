"""Evaluation of one model on benchmark files: bits per byte, then generation and scores for every seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.evaluation.bits import ReferenceBits, row_bits
from vocabridge.evaluation.engine import Generation, GenerationEngine, GenerationSettings, engine_settings
from vocabridge.evaluation.metrics import percentage, score_example
from vocabridge.evaluation.plan import PAPER_SEEDS, DataFile, DataFiles, EvaluationPlan, plan_evaluation
from vocabridge.evaluation.responses import Responder, generation_progress
from vocabridge.evaluation.results import EvaluationResult, FileResult, SeedScores, domain_average
from vocabridge.evaluation.run_folder import Manifest, Overwrite, Record, RunFolder, damaged
from vocabridge.evaluation.statistics import mean_std
from vocabridge.evaluation.vllm_engine import VllmModel, check_vllm
from vocabridge.fingerprints import data_fingerprint, model_fingerprint
from vocabridge.models.loading import check_tokenizer_matches, load_model, load_tokenizer
from vocabridge.models.spec import Engine, ModelSpec
from vocabridge.prompts import Template
from vocabridge.ranks import Ranks
from vocabridge.text import Example


def evaluate_model(
    spec: ModelSpec,
    data: Sequence[str],
    *,
    output_dir: str | PathLike[str],
    seeds: Sequence[int] = PAPER_SEEDS,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    limit: int | None = None,
    in_domain: Sequence[str] | None = None,
    overwrite: Overwrite = False,
    engine: Engine = "transformers",
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Read the data, load a model and its tokenizer, and evaluate; the other arguments are those of :func:`evaluate`.

    ``engine`` is what generates; ``vllm`` must be installed. Bits per byte always come from transformers, before.

    Raises:
        UserError: as :func:`evaluate`, or the model cannot be loaded, or the engine is not there.
    """
    ranks = ranks or Ranks()
    if engine == "vllm":
        check_vllm(spec, num_processes=ranks.world_size)
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size
    )
    plan = plan_evaluation(data, seeds=seeds, settings=settings, limit=limit, in_domain=in_domain)
    tokenizer = load_tokenizer(spec)
    model = load_model(spec)
    check_tokenizer_matches(tokenizer, model, "student")
    place = _Place(Path(output_dir), overwrite, spec.model, engine, ranks)
    evaluation = _start(model, tokenizer, plan, template=spec.template, place=place)
    if engine == "transformers":
        return evaluation.generate(evaluation.responder.transformers_engine(model))
    served = VllmModel.like(model, spec)
    del model  # its memory is vLLM's from here on
    examples = [example for file in plan.files for example in file.examples]
    return evaluation.generate(evaluation.responder.vllm_engine(served, examples))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    files: DataFiles,
    output_dir: str | PathLike[str],
    seeds: Sequence[int] = PAPER_SEEDS,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    template: Template = "plain",
    limit: int | None = None,
    in_domain: Sequence[str] | None = None,
    overwrite: Overwrite = False,
    model_name: str = "model",
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Score a model on files of prompts and references.

    Rows without a response are left out and counted; a prompt that leaves no room for ``max_new_tokens`` loses its
    beginning. Predictions are written as they come, and an evaluation that was interrupted goes on where it stopped:
    call it again with the same arguments. The files are described in ``evaluation.run_folder``.

    Args:
        model: a causal language model; dtype and device are kept.
        tokenizer: the model's.
        files: paths or dataset names, or a mapping from names to anything ``read_examples`` takes. A path's name in
            the results is its stem.
        output_dir: where predictions and results.json go.
        seeds: one generation of every response each; greedy decoding uses only the first.
        max_new_tokens: longest response in tokens.
        temperature: 0 is greedy.
        top_p: share of the probability mass to sample from.
        batch_size: rows generated at once.
        template: how prompts are rendered, ``plain`` or ``chat``.
        limit: use only the first so many rows of each file.
        in_domain: names of the in-domain files; None or nothing means the first file.
        overwrite: discard an earlier evaluation in ``output_dir``; ``"other model"``: if it was of another model.
        model_name: what the results call the model.
        ranks: the processes that share the work (:func:`vocabridge.ranks.launched_ranks`), which must all call this
            with the same arguments. The first one writes; all get the result, which is that of one process.

    Raises:
        UserError: a setting, file or row that cannot be used, or a folder with a different evaluation.
    """
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size
    )
    plan = plan_evaluation(files, seeds=seeds, settings=settings, limit=limit, in_domain=in_domain)
    place = _Place(Path(output_dir), overwrite, model_name, "transformers", ranks or Ranks())
    evaluation = _start(model, tokenizer, plan, template=template, place=place)
    return evaluation.generate(evaluation.responder.transformers_engine(model))


# --- all files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an evaluation runs and goes, and what it calls itself."""

    path: Path
    overwrite: Overwrite
    model_name: str
    engine: Engine
    ranks: Ranks


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """What is left when the references have been scored: the prompts, which need an engine and no model of ours."""

    plan: EvaluationPlan
    responder: Responder
    folder: RunFolder
    bits: tuple[ReferenceBits, ...]
    """Of each file."""
    model_name: str
    ranks: Ranks

    def generate(self, engine: GenerationEngine) -> EvaluationResult:
        """Answer all prompts and put the results together."""
        plan = self.plan
        with generation_progress(self.ranks) as progress:
            evaluator = _Evaluator(self.responder, engine, self.folder, progress, self.ranks)
            files = tuple(
                _evaluate_file(evaluator, file, plan.seeds, bits)
                for file, bits in zip(plan.files, self.bits, strict=True)
            )
        result = EvaluationResult(
            model=self.model_name,
            settings=plan.settings,
            files=files,
            in_domain=domain_average([file for file in files if file.in_domain]),
            out_of_domain=domain_average([file for file in files if not file.in_domain]),
        )
        if self.ranks.is_first:
            self.folder.save_results(result.to_json())
        return result


def _start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: EvaluationPlan,
    *,
    template: Template,
    place: _Place,
) -> _Evaluation:
    """All that needs the model itself: its fingerprint and the bits of the references."""
    responder = Responder.of(model.config, tokenizer, settings=plan.settings, template=template)
    settings = {**asdict(plan.settings), "template": template, "dtype": str(model.dtype)}
    manifest = Manifest(
        model=model_fingerprint(model, tokenizer),
        settings=settings | engine_settings(place.engine),
        data={file.name: data_fingerprint(file.examples) for file in plan.files},
    )
    ranks = place.ranks
    ranks.check_same(manifest, "model, settings or data")
    folder = ranks.on_first(lambda: RunFolder(place.path, manifest, overwrite=place.overwrite))
    with generation_progress(ranks) as progress:
        bits = tuple(
            _file_bits(model, responder, file, folder=folder, progress=progress, ranks=ranks) for file in plan.files
        )
    return _Evaluation(plan, responder, folder, bits, place.model_name, ranks)


def _file_bits(
    model: PreTrainedModel,
    responder: Responder,
    file: DataFile,
    *,
    folder: RunFolder,
    progress: Progress,
    ranks: Ranks,
) -> ReferenceBits:
    if saved := ranks.on_first(lambda: folder.load_bits(file.name)):
        try:
            return ReferenceBits(**saved)
        except TypeError as error:
            raise damaged(folder.bits_path(file.name), error) from error
    task = progress.add_task(f"{file.name}: bits per byte", total=len(file.examples))
    rows = row_bits(
        model,
        responder.tokenizer,
        file.examples,
        max_length=responder.context,
        template=responder.renderer.template,
        batch_size=responder.settings.batch_size,
        on_batch=lambda num_rows: progress.advance(task, num_rows),
        ranks=ranks,
    )
    bits = ReferenceBits.of(rows, len(file.examples))
    if ranks.is_first:
        folder.save_bits(file.name, asdict(bits), rows=map(asdict, rows))
    return bits


# --- one file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Evaluator:
    """What is the same for all files."""

    responder: Responder
    engine: GenerationEngine
    folder: RunFolder
    progress: Progress
    ranks: Ranks


def _evaluate_file(evaluator: _Evaluator, file: DataFile, seeds: Sequence[int], bits: ReferenceBits) -> FileResult:
    responder = evaluator.responder
    scores = tuple(_scores(evaluator, file, seed) for seed in seeds)
    return FileResult(
        name=file.name,
        in_domain=file.in_domain,
        num_examples=len(file.examples),
        num_without_response=file.num_without_response,
        num_cut_prompts=sum(len(responder.renderer(example)) > responder.room for example in file.examples),
        rouge_l=mean_std([score.rouge_l for score in scores]),
        exact_match=mean_std([score.exact_match for score in scores]),
        bits_per_byte=bits.per_byte,
        reference_bits=bits,
        seeds=scores,
    )


def _scores(evaluator: _Evaluator, file: DataFile, seed: int) -> SeedScores:
    records = evaluator.responder.respond(
        file.examples,
        evaluator.engine,
        seed=seed,
        file=evaluator.folder.predictions(file.name, seed),
        make_record=_record,
        progress=evaluator.progress,
        title=f"{file.name}: seed {seed}",
        ranks=evaluator.ranks,
    )
    try:
        return evaluator.ranks.on_first(lambda: _seed_scores(seed, records))
    except (KeyError, TypeError) as error:  # of records that somebody else wrote
        raise damaged(evaluator.folder.predictions(file.name, seed).path, error) from error


def _record(example: Example, generation: Generation, prediction: str) -> Record:
    scores = score_example(prediction, example.references)
    return {
        "source": example.source,
        "prompt": example.prompt,
        "prediction": prediction,
        "references": list(example.references),
        "rouge_l": scores.rouge_l,
        "exact_match": scores.exact_match,
        "num_tokens": len(generation.token_ids),
        "finished": generation.finished,
    }


def _seed_scores(seed: int, records: Sequence[Record]) -> SeedScores:
    return SeedScores(
        seed=seed,
        rouge_l=percentage([record["rouge_l"] for record in records]),
        exact_match=percentage([record["exact_match"] for record in records]),
        finished=sum(record["finished"] for record in records) / len(records),
    )
