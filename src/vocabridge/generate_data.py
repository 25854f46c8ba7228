"""Sequence-level distillation as a data step: the teacher answers the training prompts (Kim & Rush 2016).

"Sequence-Level Knowledge Distillation", arXiv 1606.07947: the student is then trained by cross-entropy on the rows
written here (objective ``cross_entropy``), so tokenizers play no role. The paper takes beam search's best answer;
greedy decoding (temperature 0) is the default here, sampling with one row per prompt and seed the alternative.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vocabridge.durable import write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.evaluation.engine import Generation, GenerationEngine, GenerationSettings, engine_settings
from vocabridge.evaluation.responses import Responder, generation_progress
from vocabridge.evaluation.run_folder import Manifest, Record, RunFolder
from vocabridge.evaluation.vllm_engine import VllmModel, check_vllm
from vocabridge.fingerprints import data_fingerprint, model_fingerprint, tokenizer_fingerprint
from vocabridge.models.loading import check_tokenizer_matches, load_model, load_tokenizer
from vocabridge.models.spec import Engine, ModelSpec
from vocabridge.models.trunkless import load_ends
from vocabridge.prompts import Template
from vocabridge.ranks import Ranks
from vocabridge.text import Example, read_examples, row_with_response


@dataclass(frozen=True, slots=True)
class GeneratedData:
    """What was written, and what was left out."""

    path: Path
    num_rows: int
    num_empty: int
    """Answers without text."""
    num_unfinished: int
    """Answers cut off by ``max_new_tokens``: training on them would teach an end where there is none."""


def generate_data(
    spec: ModelSpec,
    data: Sequence[str],
    output: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    settings: GenerationSettings,
    limit: int | None = None,
    overwrite: bool = False,
    engine: Engine = "transformers",
    ranks: Ranks | None = None,
) -> GeneratedData:
    """Have a model answer all prompts and write the rows ``vocabridge distill`` trains on.

    Answers come in batches and are kept in ``<output>.generation`` until all are there; after an interruption the same
    call goes on. Every row keeps its prompt in plain and chat form, and says its ``source``, ``teacher`` and ``seed``.

    Args:
        spec: the teacher.
        data: files of prompts; their own responses are not looked at.
        output: JSONL file to write.
        seeds: one answer per prompt and seed; greedy decoding needs only one.
        settings: length, temperature, nucleus, batch size.
        limit: answer only the first so many prompts.
        overwrite: replace an output that is there, and discard answers that other settings or data left unfinished.
        engine: what generates; ``vllm`` must be installed.
        ranks: the processes that share the prompts (:func:`vocabridge.ranks.launched_ranks`), which must all call this
            with the same arguments; the first one writes, and it writes what one process would.

    Raises:
        UserError: the output exists, data, model or engine cannot be used, or no answer is of use.
    """
    output = Path(output)
    ranks = ranks or Ranks()
    ranks.on_first(lambda: _check_output(output, overwrite=overwrite))
    if engine == "vllm":
        check_vllm(spec, num_processes=ranks.world_size)
    if settings.greedy and len(set(seeds)) > 1:
        raise UserError("several seeds with temperature 0 give the same answers; give one seed or a temperature.")
    examples = read_examples(list(data), limit=limit)
    tokenizer = load_tokenizer(spec)
    teacher = _teacher(spec, tokenizer, examples, settings=settings, engine=engine)
    manifest = Manifest(
        model=teacher.fingerprint,
        settings={**asdict(settings), "template": spec.template, "dtype": teacher.dtype} | engine_settings(engine),
        data={"prompts": data_fingerprint(examples)},
    )
    ranks.check_same(manifest, "model, settings or prompts")
    path = output.with_name(f"{output.name}.generation")
    folder = ranks.on_first(lambda: _answers_folder(path, manifest, overwrite=overwrite))
    with generation_progress(ranks) as progress:
        records = {
            seed: teacher.responder.respond(
                examples,
                teacher.engine,
                seed=seed,
                file=folder.predictions("prompts", seed),
                make_record=_record,
                progress=progress,
                title=f"seed {seed}",
                ranks=ranks,
            )
            for seed in dict.fromkeys(seeds)
        }
    written = ranks.on_first(lambda: _write(output, examples, records, model=spec.model))
    if ranks.is_first:
        shutil.rmtree(folder.path)  # without rows, too, or it would stand in the way of other settings
    if not written.num_rows:
        raise UserError(
            f"{spec.model} gave no usable answer: {written.num_unfinished} were cut off at {settings.max_new_tokens} "
            f"tokens and {written.num_empty} were empty; raise --max-new-tokens or check the template."
        )
    return written


def _write(
    output: Path, examples: Sequence[Example], records: Mapping[int, Sequence[Record]], *, model: str
) -> GeneratedData:
    """The usable answers of every seed as training rows; without one, no file."""
    rows: list[Record] = []
    num_empty = num_unfinished = 0
    for seed, answers in records.items():
        for example, answer in zip(examples, answers, strict=True):
            if not answer["finished"]:
                num_unfinished += 1
            elif not answer["response"].strip():
                num_empty += 1
            else:
                extra = {"source": example.source, "teacher": model, "seed": seed}
                rows.append({**row_with_response(example, answer["response"]), **extra})
    if rows:
        write_in_one_piece(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return GeneratedData(output, len(rows), num_empty, num_unfinished)


@dataclass(frozen=True, slots=True)
class _Teacher:
    """A teacher that is ready to answer."""

    responder: Responder
    engine: GenerationEngine
    fingerprint: str
    dtype: str


def _teacher(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    settings: GenerationSettings,
    engine: Engine,
) -> _Teacher:
    if engine == "transformers":
        model = load_model(spec)
        responder = _responder(model, tokenizer, settings, spec.template)
        fingerprint = model_fingerprint(model, tokenizer)
        return _Teacher(responder, responder.transformers_engine(model), fingerprint, str(model.dtype))
    ends = load_ends(spec)  # embeddings, head and a name for the rest, which vLLM loads
    responder = _responder(ends.model, tokenizer, settings, spec.template)
    served = VllmModel.like(ends.model, spec)
    fingerprint = f"{ends.fingerprint} {tokenizer_fingerprint(tokenizer)}"
    return _Teacher(responder, responder.vllm_engine(served, examples), fingerprint, str(ends.model.dtype))


def _responder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings, template: Template
) -> Responder:
    check_tokenizer_matches(tokenizer, model, "teacher")
    return Responder.of(model.config, tokenizer, settings=settings, template=template)


def _answers_folder(path: Path, manifest: Manifest, *, overwrite: bool) -> RunFolder:
    """Answers to the same question are kept even when the output is to be replaced: they took a teacher's time."""
    try:
        return RunFolder(path, manifest)
    except UserError:
        if not overwrite:
            raise
        return RunFolder(path, manifest, overwrite=True)


def _record(example: Example, generation: Generation, text: str) -> Record:
    return {"response": text, "finished": generation.finished}


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.is_dir():
        raise UserError(f"{output} is a folder; name a file to write.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; name another file, or add --overwrite to replace it.")
    if not output.parent.is_dir():
        raise UserError(f"{output}: the folder {output.parent} does not exist.")
