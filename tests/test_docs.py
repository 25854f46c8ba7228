"""What the documents promise, run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.cli import app
from vocabridge.objectives import objective_info, objective_names
from vocabridge.recipe import load_recipe
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def block(text, language, containing):
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", text, re.S) if containing in b]
    return found


@pytest.fixture
def folders(tmp_path, monkeypatch, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    """Stand-ins for the hub's models and the data of the examples, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, model, tokenizer in [
        ("student", student_model(tiny_bpe_tokenizer), tiny_bpe_tokenizer),
        ("teacher", teacher_model(tiny_sentencepiece_tokenizer), tiny_sentencepiece_tokenizer),
    ]:
        if name == "student":
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}assistant:\\n"
            )
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        tokenizer.chat_template = None
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
    assert recipe.objective.config.query_start == "closed_form"


@pytest.mark.usefixtures("folders")
def test_objective_of_contributing_trains_and_passes_its_test():
    Path("my_objectives").mkdir()
    Path("my_objectives/exact_pairs.py").write_text(block(CONTRIBUTING, "python", "class ExactPairs"))
    trainer = DistillationTrainer(
        "student",
        "teacher",
        objective={"name": "my_objectives.exact_pairs", "weight": 0.3},
        args=DistillationConfig(output_dir="run", max_steps=2, logging_steps=1, use_cpu=True, report_to="none"),
        train_dataset="train.jsonl",
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert all(entry["loss/agreement"] > 0 and 0 < entry["exact_pair_share"] < 1 for entry in entries)
    names = {}
    exec(compile(block(CONTRIBUTING, "python", "def test_one_to_one"), "CONTRIBUTING.md", "exec"), names)
    names["test_one_to_one_by_loops"]()


def test_table_of_objectives_is_the_registrys():
    lines = ["| name | what it does | needs | use it when |", "|---|---|---|---|"]
    for name in objective_names():
        info = objective_info(name)
        needs = ", ".join(info.config_class.needs) or "-"
        lines.append(f"| `{name}` | {info.summary} | {needs} | {info.config_class.use_when} |")
    expected = "\n".join(lines)
    found = README.split("<!-- objectives -->")[1].split("<!-- /objectives -->")[0].strip()
    assert found == expected, f"put this between the marks in README.md:\n{expected}"


@pytest.mark.parametrize("text", [README, CONTRIBUTING, GUIDE], ids=["README", "CONTRIBUTING", "guide"])
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
    for target in set(re.findall(r"make ([a-z]+)", README + CONTRIBUTING)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_logged_names_of_the_guide_are_logged(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, tmp_path):
    seen = set()
    for matching in ("gan", "mmd"):
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
