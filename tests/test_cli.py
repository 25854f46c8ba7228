"""The command line: arguments, exit codes, messages, and how fast it answers."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from vocabridge import cli
from vocabridge.errors import UserError
from vocabridge.objectives import objective_names
from vocabridge.preemption import Preempted
from vocabridge.ranks import Ranks

RECIPE = """\
data: {train: org/rows}
student: {model: org/student}
objective: {name: cross_entropy}
training: {output_dir: runs/x}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path / "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


class Command:
    """Runs ``vocabridge`` with arguments inside this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *args: str) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", ["vocabridge", *args])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = self.capsys.readouterr()
        return Outcome(int(left.value.code or 0), captured.out, captured.err)

    def replace(self, module: str, **values: Any) -> None:
        """Let a command import stand-ins instead of a module."""
        stand_in = ModuleType(module)
        vars(stand_in).update(values)
        self.monkeypatch.setitem(sys.modules, module, stand_in)


@pytest.fixture
def vocabridge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


# --- help, version, validate, objectives -----------------------------------------------------------------------------


def test_help_names_every_command(vocabridge: Command) -> None:
    outcome = vocabridge("--help")
    assert outcome.code == 0
    for command in (
        "distill",
        "validate",
        "objectives",
        "inspect-pair",
        "evaluate",
        "generate-data",
        "cache-teacher",
        "analyze",
    ):
        assert command in outcome.out
        assert vocabridge(command, "--help").code == 0


def test_version_is_the_packages(vocabridge: Command) -> None:
    from importlib.metadata import version

    assert vocabridge("--version").out == f"vocabridge {version('vocabridge')}\n"


def test_validate_says_what_the_recipe_is(vocabridge: Command) -> None:
    outcome = vocabridge("validate", "recipe.yaml", "student.model=org/other")
    assert outcome.code == 0
    assert outcome.out == "recipe.yaml: ok: cross_entropy, org/other, run folder runs/x\n"
    assert outcome.err == ""


def test_validate_notes_a_teacher_without_use(vocabridge: Command) -> None:
    outcome = vocabridge("validate", "recipe.yaml", "teacher.model=org/teacher")
    assert outcome.code == 0
    assert outcome.err == "note: objective 'cross_entropy' does not use the teacher\n"


def test_every_problem_is_one_error_line_and_exit_code_2(vocabridge: Command) -> None:
    outcome = vocabridge("validate", "recipe.yaml", "training.sed=1", "data.limit=x")
    assert outcome.code == 2
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: command line: ") for line in lines)
    assert "did you mean 'seed'?" in outcome.err


def test_missing_recipe_and_bad_usage(vocabridge: Command) -> None:
    outcome = vocabridge("validate", "missing.yaml")
    assert outcome.code == 2
    assert outcome.err == "error: missing.yaml: the recipe cannot be read: No such file or directory.\n"
    assert vocabridge("validate").code == 2
    assert vocabridge("train").code == 2
    assert vocabridge("distill", "recipe.yaml", "--resum").code == 2


def test_objectives_lists_every_objective(vocabridge: Command) -> None:
    outcome = vocabridge("objectives")
    assert outcome.code == 0
    assert len(objective_names()) >= 2
    for name in objective_names():
        assert name in outcome.out


# --- distill ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunResult:
    run_dir: Path
    interrupted: bool
    steps: int
    preempted: bool
    evaluation: None = None


class Run:
    """Stands in for ``vocabridge.run``."""

    def __init__(
        self, *, interrupted: bool = False, preempted: bool = False, error: BaseException | None = None
    ) -> None:
        self.interrupted, self.preempted = interrupted, preempted
        self.error = error
        self.calls: list[tuple[str, int, bool, bool]] = []

    def distill(self, recipe: Any, *, resume: bool, overwrite: bool) -> RunResult:
        arguments = recipe.training.arguments()
        self.calls.append((recipe.objective.name, arguments.get("seed", 42), resume, overwrite))
        if self.error:
            raise self.error
        return RunResult(Path(arguments["output_dir"]), self.interrupted, 7, self.preempted)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((), (False, False)), (("--resume",), (True, False)), (("--overwrite",), (False, True))],
)
def test_distill_hands_over_recipe_and_flags(
    vocabridge: Command, flags: tuple[str, ...], expected: tuple[bool, bool]
) -> None:
    run = Run()
    vocabridge.replace("vocabridge.run", distill=run.distill)
    outcome = vocabridge("distill", "recipe.yaml", *flags, "training.seed=5")
    assert outcome.code == 0
    assert run.calls == [("cross_entropy", 5, *expected)]
    assert "runs/x" in outcome.out


@pytest.mark.parametrize(
    ("run", "code"),
    [
        (Run(interrupted=True), 130),
        (Run(error=KeyboardInterrupt()), 130),
        (Run(interrupted=True, preempted=True), 0),
        (Run(error=Preempted()), 0),
    ],
    ids=["Ctrl-C", "Ctrl-C twice", "SIGTERM in training", "SIGTERM elsewhere"],
)
def test_interrupted_run_tells_how_to_go_on(vocabridge: Command, run: Run, code: int) -> None:
    vocabridge.replace("vocabridge.run", distill=run.distill)
    outcome = vocabridge("distill", "recipe.yaml", "training.run_name=two words")
    assert outcome.code == code
    assert len(run.calls) == 1
    assert outcome.err.endswith("go on with: vocabridge distill recipe.yaml 'training.run_name=two words' --resume\n")


def test_no_resumption_is_advised_where_checkpoints_hold_weights_alone(vocabridge: Command) -> None:
    vocabridge.replace("vocabridge.run", distill=Run(interrupted=True).distill)
    outcome = vocabridge("distill", "recipe.yaml", "training.save_only_model=true")
    assert outcome.code == 130
    assert "weights only (training.save_only_model)" in outcome.err
    assert "--resume" not in outcome.err


def test_mistake_found_while_running_is_told_without_a_traceback(vocabridge: Command) -> None:
    vocabridge.replace("vocabridge.run", distill=Run(error=UserError("runs/x is not empty.")).distill)
    assert vocabridge("distill", "recipe.yaml") == Outcome(2, "", "error: runs/x is not empty.\n")


def test_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, vocabridge: Command) -> None:
    vocabridge.replace("vocabridge.run", distill=Run(error=AssertionError("ours")).distill)
    monkeypatch.setattr(sys, "argv", ["vocabridge", "distill", "recipe.yaml"])
    with pytest.raises(AssertionError, match="ours"):
        cli.main()


def test_full_disk_is_one_sentence_and_other_failures_of_the_system_are_defects(
    monkeypatch: pytest.MonkeyPatch, vocabridge: Command
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")
    vocabridge.replace("vocabridge.run", distill=Run(error=full).distill)
    outcome = vocabridge("distill", "recipe.yaml")
    assert outcome.code == 2
    assert outcome.err.startswith("error: runs/x/metrics.jsonl: No space left on device; free some space or mend")
    vocabridge.replace("vocabridge.run", distill=Run(error=FileNotFoundError(errno.ENOENT, "gone")).distill)
    monkeypatch.setattr(sys, "argv", ["vocabridge", "distill", "recipe.yaml"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_broken_recipe_never_reaches_the_run(vocabridge: Command) -> None:
    run = Run()
    vocabridge.replace("vocabridge.run", distill=run.distill)
    assert vocabridge("distill", "recipe.yaml", "training.seed=x").code == 2
    assert vocabridge("distill", "recipe.yaml", "--resume", "--overwrite").code == 2
    assert run.calls == []


# --- evaluate --------------------------------------------------------------------------------------------------------


class Evaluation:
    """Stands in for ``vocabridge.evaluation.evaluate``."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def evaluate_model(self, spec: Any, data: list[str], *, ranks: Ranks, **settings: Any) -> str:
        assert ranks.world_size == 1, "no launcher started others"
        self.calls.append({"model": spec.model, "template": spec.template, "data": list(data), **settings})
        if self.error:
            raise self.error
        return "the table"


def evaluation(vocabridge: Command, error: BaseException | None = None) -> Evaluation:
    stand_in = Evaluation(error)
    vocabridge.replace("vocabridge.evaluation.evaluate", evaluate_model=stand_in.evaluate_model)
    vocabridge.replace("vocabridge.evaluation.results", results_table=lambda result: result)
    return stand_in


def test_evaluate_takes_several_words_after_an_option(vocabridge: Command) -> None:
    stand_in = evaluation(vocabridge)
    words = (
        "evaluate M --data a.jsonl b.jsonl --seeds 10 20 30 --in-domain a b --limit 3 --template chat --temperature 0"
    )
    outcome = vocabridge(*words.split())
    assert outcome.code == 0
    assert "the table" in outcome.out
    assert stand_in.calls == [
        {
            "model": "M",
            "template": "chat",
            "data": ["a.jsonl", "b.jsonl"],
            "output_dir": Path("evaluations/M"),
            "seeds": [10, 20, 30],
            "max_new_tokens": 256,
            "temperature": 0.0,
            "top_p": 1.0,
            "batch_size": 16,
            "limit": 3,
            "in_domain": ["a", "b"],
            "overwrite": False,
            "engine": "transformers",
        }
    ]


def test_evaluate_takes_repeated_options_and_defaults(vocabridge: Command) -> None:
    stand_in = evaluation(vocabridge)
    Path("runs/x").mkdir(parents=True)
    assert vocabridge("evaluate", "--data=a.jsonl", "--data", "b.jsonl", "--overwrite", "runs/x").code == 0
    (call,) = stand_in.calls
    assert call["data"] == ["a.jsonl", "b.jsonl"]
    assert call["seeds"] == (10, 20, 30, 40, 50)
    assert call["output_dir"] == Path("runs/x/evaluation")
    assert call["in_domain"] is None
    assert call["overwrite"] is True


@pytest.mark.parametrize(
    "words", ["evaluate M", "evaluate --data a", "evaluate M --data a --seeds x", "evaluate M --data a --top-p 2"]
)
def test_evaluate_refuses_bad_usage(vocabridge: Command, words: str) -> None:
    stand_in = evaluation(vocabridge)
    assert vocabridge(*words.split()).code == 2
    assert stand_in.calls == []


def test_interrupted_evaluation_tells_how_to_go_on(vocabridge: Command) -> None:
    evaluation(vocabridge, KeyboardInterrupt())
    outcome = vocabridge("evaluate", "M", "--data", "a")
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err


def test_commands_call_what_exists() -> None:
    """The stand-ins above take what the real functions take."""
    import inspect

    from vocabridge.evaluation.evaluate import evaluate_model
    from vocabridge.run import distill

    assert set(inspect.signature(distill).parameters) == {"recipe", "resume", "overwrite"}
    names = {"spec", "data", "output_dir", "seeds", "max_new_tokens", "temperature", "top_p", "batch_size", "limit"}
    assert set(inspect.signature(evaluate_model).parameters) == {*names, "in_domain", "overwrite", "engine", "ranks"}


# --- inspect-pair ----------------------------------------------------------------------------------------------------


def test_inspect_pair_prints_and_writes_the_report(
    vocabridge: Command,
    tiny_bpe_tokenizer: PreTrainedTokenizerFast,
    tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_bpe_tokenizer.save_pretrained("student")
    tiny_sentencepiece_tokenizer.save_pretrained("teacher")
    rows = [{"prompt": "Say it.", "output": "Hello there, world."}, {"prompt": "Again.", "output": "Höhe 漢字 🙂"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = vocabridge("inspect-pair", "student", "teacher", "--data", "rows.jsonl", "--json", "report.json")
    assert outcome.code == 0
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert report["rows"]["kept"] == 2
    assert report["response_bytes"] == sum(len(row["output"].encode()) for row in rows)
    assert "student" in outcome.out
    assert "2 of 2 rows" in outcome.out


def test_inspect_pair_tells_mistakes_before_any_tokenizer_loads(vocabridge: Command) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "output": "b"}\n{"prompt": \n', encoding="utf-8")
    outcome = vocabridge("inspect-pair", "student", "teacher", "--data", "rows.jsonl")
    assert outcome.code == 2
    assert outcome.err.startswith("error: rows.jsonl:2: ")
    outcome = vocabridge("inspect-pair", "student", "teacher", "--data", "rows.jsonl", "--json", "no/where.json")
    assert outcome.err == "error: --json no/where.json: the folder no does not exist.\n"


# --- as a process ----------------------------------------------------------------------------------------------------


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def program(*args: str) -> list[str]:
    return [sys.executable, "-c", "from vocabridge.cli import main; main()", *args]


def test_installed_program_is_this_command_line() -> None:
    installed = Path(sys.executable).with_name("vocabridge")
    assert run(str(installed), "--version").stdout == run(*program("--version")).stdout


def test_process_reports_mistakes_with_exit_code_2() -> None:
    result = run(*program("validate", "recipe.yaml", "training.sed=1"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: command line: training.sed is unknown")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["objectives", "--help"])
def test_reader_that_goes_away_is_no_error(command: str) -> None:
    with subprocess.Popen(program(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
    assert complaint == ""


@pytest.mark.parametrize("args", [("--help",), ("validate", "recipe.yaml"), ("objectives",), ("evaluate", "--help")])
def test_light_commands_import_no_torch(args: tuple[str, ...]) -> None:
    code = (
        "import atexit, sys; from vocabridge.cli import main\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'}\n"
        "atexit.register(lambda: print('loaded:', *(heavy & set(sys.modules))))\n"
        "main()"
    )
    result = run(sys.executable, "-c", code, *args)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("args", [("--help",), ("validate", "recipe.yaml")])
def test_light_commands_take_a_few_times_what_their_libraries_take(args: tuple[str, ...]) -> None:
    """Torch alone would be twenty times the bare libraries; processor time, so that a busy machine does not matter."""

    def processor_seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*command).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    bare = min(processor_seconds(sys.executable, "-c", "import pydantic, typer") for _ in range(4))
    ours = min(processor_seconds(*program(*args)) for _ in range(4))
    assert ours < 10 * bare
