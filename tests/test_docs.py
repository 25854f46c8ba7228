"""What the documents promise, run."""

import copy
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_pair import ROWS, save_pair, student_model, teacher_model
from vocabridge.cli import app
from vocabridge.objectives import objective_names
from vocabridge.recipe import load_recipe
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
CHOOSING = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
sys.path.append(str(ROOT / "docs"))
from tables import RECIPES, TABLES, rewritten  # noqa: E402

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def block(text, language, containing):
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", text, re.S) if containing in b]
    return found


@pytest.fixture
def folders(tmp_path, monkeypatch, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    """Stand-ins for the hub's models and the data of the examples, in the current folder."""
    monkeypatch.chdir(tmp_path)
    student_tokenizer = copy.deepcopy(tiny_bpe_tokenizer)
    student_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}assistant:\\n"
    )
    save_pair(tmp_path, student_tokenizer, tiny_sentencepiece_tokenizer)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("test.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")


def with_local_models(text):
    return text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "student").replace("google/gemma-3-270m", "teacher")


@pytest.mark.usefixtures("folders")
def test_ten_lines_of_python_run():
    code = with_local_models(block(README, "python", "DistillationTrainer")).replace("max_steps=100", "max_steps=2")
    assert len(code.strip().splitlines()) <= 14
    exec(compile(code, "README.md", "exec"), {})
    assert Path("runs/first/model.safetensors").is_file()


@pytest.mark.usefixtures("folders")
def test_recipe_of_the_readme_is_valid():
    Path("recipe.yaml").write_text(with_local_models(block(README, "yaml", "dskd_cma")))
    recipe = load_recipe("recipe.yaml")
    assert recipe.objective.terms[0].config.query_start == "closed_form"


@pytest.mark.usefixtures("folders")
def test_objective_of_contributing_trains_and_passes_its_test():
    Path("my_objectives").mkdir()
    Path("my_objectives/exact_pairs.py").write_text(block(CONTRIBUTING, "python", "class ExactPairs"))
    trainer = DistillationTrainer(
        "student",
        "teacher",
        objective={"name": "my_objectives.exact_pairs", "kd_weight": 0.3},
        args=DistillationConfig(output_dir="run", max_steps=2, logging_steps=1, use_cpu=True, report_to="none"),
        train_dataset="train.jsonl",
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert all(entry["agreement"] > 0 and 0 < entry["coverage"] < 1 for entry in entries)
    names = {}
    exec(compile(block(CONTRIBUTING, "python", "def test_agreement"), "CONTRIBUTING.md", "exec"), names)
    names["test_agreement_by_loops"]()


@pytest.mark.parametrize(
    ("document", "name", "make"),
    [(document, name, make) for document, tables in TABLES.items() for name, make in tables.items()],
)
def test_tables_are_those_of_the_code(document, name, make):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert rewritten(text, name, make()) == text, "run: python docs/tables.py"


def test_every_defect_has_a_test_that_exists():
    rows = [
        line for line in (ROOT / "docs" / "defects.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    assert len(rows) > 40
    for row in rows[1:]:
        tests = re.findall(r"`(tests/\S+\.py)::(\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_has_a_test_and_a_recipe(name):
    assert (ROOT / f"tests/objectives/test_{name}.py").is_file()
    recipe = ROOT / f"recipes/{RECIPES.get(name, name)}.yaml"
    assert f"name: {name}\n" in recipe.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [README, CONTRIBUTING, GUIDE, CHOOSING, PAPERS], ids=lambda text: text.split()[1])
def test_commands_exist(text):
    commands = {line.split("#")[0].strip() for line in re.findall(r"(?:^|`)(vocabridge [^`\n]+)", text, re.M)}
    runner = CliRunner()
    for command in commands:
        words = shlex.split(command.replace("[section.key=value ...]", ""))[1:]
        shown = runner.invoke(app, [words[0], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, command
        for option in [word for word in words if word.startswith("--")]:
            assert option in shown.output, command


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README + CONTRIBUTING)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_logged_names_of_the_guide_are_logged(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, tmp_path):
    seen = set()
    for matching in ("gan", "mmd", "energy", "coral", "sinkhorn", "conditional_transport"):
        trainer = DistillationTrainer(
            student_model(tiny_bpe_tokenizer),
            teacher_model(tiny_sentencepiece_tokenizer),
            objective={"name": "dskd_cma", "matching": matching},
            args=DistillationConfig(
                output_dir=str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to="none"
            ),
            train_dataset=ROWS,
            student_tokenizer=tiny_bpe_tokenizer,
            teacher_tokenizer=tiny_sentencepiece_tokenizer,
        )
        trainer.train()
        seen |= {name for entry in trainer.state.log_history for name in entry}
    table = GUIDE.split("| name | meaning |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    named = {name for cell in cells for name in re.findall(r"`([a-z0-9_/]+)`", cell)}
    assert named - seen == set()
    bookkeeping = {"epoch", "step", "grad_norm", "learning_rate", "total_flos", "train_loss", "train_runtime"}
    assert {name for name in seen - named - bookkeeping if not name.startswith(("train_", "probe/"))} == set()
