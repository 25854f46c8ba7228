"""The command line; every heavy import sits inside the command that needs it, so ``--help`` answers at once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from vocabridge.command_line import ListCommand, check_json, run_app, stoppable
from vocabridge.errors import UserError
from vocabridge.preemption import Preempted
from vocabridge.ranks import launched_ranks

if TYPE_CHECKING:
    from vocabridge.recipe import Recipe

_SAME_COMMAND = "the same command goes on where it stopped"
_WEIGHTS_ONLY = (
    "the checkpoint holds weights only (training.save_only_model), so training cannot go on from it; it can start a "
    "new run as student.model"
)

app = typer.Typer(
    help="Distil a large language model into a small one when the two have different tokenizers and vocabularies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Replace values of the recipe: training.learning_rate=5e-4"),
]
Template = Literal["plain", "chat"]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; auto: the checkpoint's own, float32 where this machine is slow in that."),
]
EngineOption = Annotated[Literal["transformers", "vllm"], typer.Option(help="What generates; vllm must be installed.")]


def main() -> None:
    """Entry point."""
    run_app(app, "vocabridge")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vocabridge {version('vocabridge')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def distill(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Empty an existing run folder first.")] = False,
) -> None:
    """Distil the teacher into the student as the recipe says."""
    from vocabridge.recipe import load_recipe

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: one keeps the run folder, the other empties it.")
    words = ["vocabridge", "distill", str(recipe), *(overrides or []), "--resume"]
    with stoppable(f"go on with: {shlex.join(words)}") as work, launched_ranks() as ranks:
        loaded = load_recipe(recipe, overrides or [])
        if ranks.is_first:
            _note_unused(loaded)
        from vocabridge.run import distill as run

        result = run(loaded, resume=resume, overwrite=overwrite)
        if result.interrupted:
            if loaded.training.arguments().get("save_only_model"):
                work.hint = _WEIGHTS_ONLY
            raise Preempted if result.preempted else KeyboardInterrupt
    if not ranks.is_first:
        return
    if result.evaluation is not None:
        from vocabridge.evaluation.results import results_table

        Console().print(results_table(result.evaluation))
    print(f"done after {result.steps} steps: {result.run_dir} loads with AutoModelForCausalLM.from_pretrained")


@app.command("cache-teacher")
def cache_teacher(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run the teacher over the recipe's data once and keep its hidden states for every later run."""
    from vocabridge.recipe import load_recipe

    with stoppable(_SAME_COMMAND), launched_ranks() as ranks:
        loaded = load_recipe(recipe, overrides or [])
        from vocabridge.run import write_teacher_cache

        cache = write_teacher_cache(loaded).cache
    if ranks.is_first:
        print(f"{cache.folder}: {len(cache)} rows, {cache.num_bytes / 1e6:.1f} MB")


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe completely, without loading any model."""
    from vocabridge.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _note_unused(loaded)
    models = loaded.student.model + (f" <- {loaded.teacher.model}" if loaded.teacher else "")
    print(f"{recipe}: ok: {loaded.objective.name}, {models}, run folder {loaded.training.output_dir}")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks, one a device.")] = 1,
    strategy: Annotated[
        Literal["ddp", "fsdp2", "zero2", "zero3"],
        typer.Option(help="Data parallelism: replicas, FSDP2, DeepSpeed's ZeRO-2 or ZeRO-3."),
    ] = "ddp",
    device_memory: Annotated[
        str | None,
        typer.Option(help="Of each device: 80GB, 24GiB. Default: of this machine's GPU.", show_default=False),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan to this file, too.")] = None,
) -> None:
    """Tell what a recipe needs of memory and disk, and what to change first; reads no weights."""
    from vocabridge.plan.recipe_plan import recipe_plan
    from vocabridge.plan.sizes import accelerator_memory, parse_size
    from vocabridge.plan.tables import plan_tables, verdict
    from vocabridge.recipe import load_recipe

    check_json(json)
    size = parse_size(device_memory, option="--device-memory") if device_memory else accelerator_memory()
    planned = recipe_plan(
        load_recipe(recipe, overrides or []), strategy=strategy, world_size=world_size, device_memory=size
    )
    for table in plan_tables(planned):
        Console().print(table)
    for note in planned.notes:
        print(f"note: {note}", file=sys.stderr)
    if json:
        json.write_text(planned.to_json(), encoding="utf-8")
    print(verdict(planned))


@app.command()
def objectives() -> None:
    """List the objectives that a recipe can name."""
    from vocabridge.objectives import objective_info, objective_names

    table = Table("name", "what it does", "needs", "heads per step", "use it when", "paper", show_lines=True)
    for name in objective_names():
        info = objective_info(name)
        config = info.config_class
        table.add_row(
            f"[bold]{name}[/]",
            info.summary,
            ", ".join(config.needs) or "-",
            config.cost,
            config.use_when,
            config.paper or "-",
        )
    Console().print(table)


@app.command("inspect-pair")
def inspect_pair(
    student: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")],
    teacher: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")],
    data: Annotated[str, typer.Option(help="JSONL file, datasets folder or hub id whose responses are compared.")],
    json: Annotated[Path | None, typer.Option(help="Write the report to this file, too.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Examples to look at.")] = 1000,
    student_template: Annotated[Template, typer.Option(help="How the student sees a prompt.")] = "plain",
    teacher_template: Annotated[Template, typer.Option(help="How the teacher sees a prompt.")] = "plain",
    max_length: Annotated[int, typer.Option(min=8, help="Longest row in tokens; longer ones are cut.")] = 512,
) -> None:
    """Report how well two tokenizers fit together: overlap, alignment, end tokens, truncation."""
    from vocabridge.alignment.report import pair_report, render_report
    from vocabridge.models.loading import load_tokenizer
    from vocabridge.models.spec import ModelSpec
    from vocabridge.pairs import PairTokenizer
    from vocabridge.text import read_examples

    check_json(json)
    examples = read_examples(data, limit=limit)  # first: a mistake in the data shows before tokenizers load
    pair_tokenizer = PairTokenizer(
        load_tokenizer(ModelSpec(model=student)),
        load_tokenizer(ModelSpec(model=teacher)),
        student_template=student_template,
        teacher_template=teacher_template,
        max_length=max_length,
    )
    report = pair_report(pair_tokenizer, examples, progress=True)
    Console().print(render_report(report))
    if json:
        json.write_text(report.to_json(), encoding="utf-8")


@app.command(cls=ListCommand)
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint folder, hub id or .gguf file.")],
    data: Annotated[list[str], typer.Option(help="One or more files: --data a.jsonl b.jsonl")],
    seeds: Annotated[
        list[int] | None, typer.Option(help="Sampling seeds: --seeds 10 20 30", show_default="10 20 30 40 50")
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Default: MODEL/evaluation, or evaluations/NAME for a hub model.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of the probability mass sampled from.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated at once (vllm decides itself).")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="First examples of each file only.")] = None,
    template: Annotated[Template, typer.Option(help="How the model sees a prompt.")] = "plain",
    in_domain: Annotated[
        list[str] | None, typer.Option(help="Names of the files that resemble the training data; default: the first.")
    ] = None,
    dtype: DtypeOption = "auto",
    engine: EngineOption = "transformers",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard results that are there.")] = False,
) -> None:
    """Score a model's responses: ROUGE-L and exact match over seeds, bits per byte of the references."""
    from vocabridge.evaluation.evaluate import evaluate_model
    from vocabridge.evaluation.plan import PAPER_SEEDS
    from vocabridge.evaluation.results import results_table
    from vocabridge.models.spec import ModelSpec

    path = Path(model)
    folder = output_dir or (path / "evaluation" if path.is_dir() else Path("evaluations", path.name))
    with stoppable(_SAME_COMMAND), launched_ranks() as ranks:
        result = evaluate_model(
            ModelSpec(model=model, template=template, dtype=dtype),
            data,
            output_dir=folder,
            seeds=seeds or PAPER_SEEDS,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            limit=limit,
            in_domain=in_domain,
            overwrite=overwrite,
            engine=engine,
            ranks=ranks,
        )
    if ranks.is_first:
        Console().print(results_table(result))
        print(f"results and predictions: {folder}")


@app.command()
def analyze(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of finished dskd_cma or dskd_cla runs.")
    ],
    data: Annotated[str, typer.Option(help="JSONL file, datasets folder or hub id whose responses are looked at.")],
    limit: Annotated[int, typer.Option(min=1, help="First examples only.")] = 256,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for JSON and pictures of one run. Default: RUN/analysis", show_default=False),
    ] = None,
) -> None:
    """Compare the cross-model attention of runs with the byte-exact chunks, before and after training."""
    from vocabridge.analysis.analyze import analyze_runs
    from vocabridge.analysis.tables import render_comparison, render_probe
    from vocabridge.analysis.training_distances import render_distances

    with stoppable("the run in hand was not written"):
        analyses = analyze_runs(runs, data, output_dir=output, limit=limit, progress=True)
    console = Console()
    for analysis in analyses:
        console.print(render_probe(analysis.probe))
        console.print(render_distances(analysis.distances, analysis.data_distances))
        print(f"JSON, heatmaps and point cloud: {analysis.folder}")
    if len(analyses) > 1:
        console.print(render_comparison([(analysis.probe, analysis.data_distances) for analysis in analyses]))


@app.command()
def study(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file: base recipe, variants, training seeds.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs trained at once; the threads are divided among them.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the study and show what is left of it.")] = False,
    results: Annotated[
        bool, typer.Option("--results", help="Train nothing; collect what is finished into study.json.")
    ] = False,
) -> None:
    """Train every variant of a recipe with every seed, and compare the variants with the baseline."""
    from vocabridge.study.estimate import first_guesses
    from vocabridge.study.plan import load_study
    from vocabridge.study.status import current_status
    from vocabridge.study.tables import plan_table, result_tables, summary_line, unfinished_lines

    if dry_run and results:
        raise UserError("--dry-run and --results exclude each other: one writes nothing, the other study.json.")
    plan = load_study(study)
    statuses = {run: current_status(run) for run in plan.runs}
    if dry_run:
        Console().print(plan_table(plan, statuses, jobs=jobs, forecasts=first_guesses(plan, statuses, jobs=jobs)))
        for line in unfinished_lines(statuses):
            print(line)
        return
    from vocabridge.study.results import study_results, write_results

    outcome = None
    if not results:
        from vocabridge.study.runner import run_study

        outcome = run_study(plan, jobs=jobs, tell=lambda line: print(line, file=sys.stderr))
    found = study_results(plan)
    path = write_results(found)
    for table in result_tables(found):
        Console().print(table)
    for line in unfinished_lines(found.statuses):
        print(line, file=sys.stderr)
    print(f"{path}: {summary_line(list(found.statuses.values()))}")
    if outcome is not None and outcome.interrupted:
        words = ["vocabridge", "study", str(study), *(["--jobs", str(jobs)] if jobs > 1 else [])]
        with stoppable(f"go on with: {shlex.join(words)}"):
            raise Preempted if outcome.preempted else KeyboardInterrupt
    if not results and any(status.state != "done" for status in found.statuses.values()):
        raise typer.Exit(1)


@app.command()
def report(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="Study file, a study's folder, or the folder of a single run.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Default: report.html in the study's or the run's folder.", show_default=False)
    ] = None,
) -> None:
    """Show a study or a run, as far as it is, on one HTML page that needs no network."""
    from vocabridge.durable import write_in_one_piece
    from vocabridge.report.collect import collect
    from vocabridge.report.page import render_page

    found = collect(study)
    path = output or found.folder / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_in_one_piece(path, render_page(found))
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}.") from error
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command("generate-data", cls=ListCommand)
def generate_data(
    teacher: Annotated[str, typer.Argument(help="Run folder, checkpoint folder, hub id or .gguf file.")],
    data: Annotated[list[str], typer.Option(help="One or more files of prompts: --data a.jsonl b.jsonl")],
    output: Annotated[Path, typer.Option(help="JSONL file to write.")],
    seeds: Annotated[
        list[int] | None, typer.Option(help="Sampling seeds, one answer each: --seeds 1 2 3", show_default="0")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; unfinished ones are left out.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of the probability mass sampled from.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated at once (vllm decides itself).")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    template: Annotated[Template, typer.Option(help="How the teacher sees a prompt.")] = "plain",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "transformers",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
) -> None:
    """Have the teacher answer the training prompts: sequence-level distillation (SeqKD), then train on the answers."""
    from vocabridge.evaluation.engine import GenerationSettings
    from vocabridge.generate_data import generate_data as generate
    from vocabridge.models.spec import ModelSpec

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size
    )
    with stoppable(_SAME_COMMAND), launched_ranks() as ranks:
        written = generate(
            ModelSpec(model=teacher, template=template, dtype=dtype),
            data,
            output,
            seeds=seeds or [0],
            settings=settings,
            limit=limit,
            overwrite=overwrite,
            engine=engine,
            ranks=ranks,
        )
    if ranks.is_first:
        left_out = f"{written.num_unfinished} unfinished and {written.num_empty} empty answers left out"
        print(f"{written.path}: {written.num_rows} rows; {left_out}")


def _note_unused(recipe: Recipe) -> None:
    if recipe.teacher and "teacher" not in recipe.objective.needs:
        print(f"note: objective '{recipe.objective.name}' does not use the teacher", file=sys.stderr)
