"""Recipes: what is accepted, what is refused and with which words, overrides, paths."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml

from recipe_cases import DISTIL, SFT, assert_round_trip, with_lines, write
from vocabridge.errors import UserError
from vocabridge.recipe import load_recipe, recipe_from_values
from vocabridge.recipe.training import OwnTrainingSettings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(write(text), overrides)
    return str(caught.value)


# --- accepted --------------------------------------------------------------------------------------------------------


def test_smallest_recipe_has_the_documented_defaults() -> None:
    recipe = load_recipe(write(DISTIL))
    assert recipe.data.train == ("org/rows",)
    assert recipe.data.max_length == 512
    assert recipe.teacher is not None
    assert recipe.teacher.model == "org/teacher"
    assert recipe.objective.terms[0].config.temperature == 2.0
    assert recipe.evaluation is not None
    assert recipe.evaluation.seeds == (10, 20, 30, 40, 50)
    assert set(recipe.training.arguments()) == set(OwnTrainingSettings.model_fields)


@pytest.mark.parametrize("written", ["5e-4", "5E-4", "0.0005", ".0005", "5.e-4", "'5e-4'", '"0.0005"', "+5.0e-4"])
def test_learning_rate_in_every_notation(written: str) -> None:
    recipe = load_recipe(write(with_lines(SFT, "training", f"learning_rate: {written}")))
    assert recipe.training.arguments()["learning_rate"] == 5e-4
    assert type(recipe.training.arguments()["learning_rate"]) is float


@pytest.mark.parametrize("written", ["5e-4", "'5e-4'"])
def test_own_learning_rate_and_objective_setting_in_scientific_notation(written: str) -> None:
    text = with_lines(DISTIL, "training", f"projector_learning_rate: {written}")
    recipe = load_recipe(write(with_lines(text, "objective", f"temperature: {written}")))
    assert recipe.training.projector_learning_rate == 5e-4
    assert recipe.objective.terms[0].config.temperature == 5e-4


def test_a_composition_reads_back_what_it_writes_and_is_overridden_by_place(tmp_path: Path) -> None:
    text = DISTIL.replace(
        "objective:\n  name: dskd_cma",
        "objective:\n  terms:\n    - {name: cross_entropy, weight: 0.5}\n    - {name: dskd_cma, weight: 0.5}",
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    recipe = load_recipe(file, ["objective.terms.1.matching=none", "objective.terms.1.weight=2"])
    assert recipe.objective.name == "cross_entropy + dskd_cma"
    assert [term.weight for term in recipe.objective.terms] == [0.5, 2.0]
    assert recipe.objective.terms[1].config.kd_weight == 1.0
    assert recipe_from_values(recipe.values()) == recipe
    with pytest.raises(UserError, match=r"objective\.terms is a list; name a place in it"):
        load_recipe(file, ["objective.terms.name=uld"])


def test_a_projector_to_learn_reads_back_in_a_resolved_recipe() -> None:
    text = DISTIL.replace("dskd_cma", "dskd_eta")
    assert_round_trip(load_recipe(write(with_lines(text, "objective", "teacher_space_projector: learned"))))


def test_whole_number_in_scientific_notation() -> None:
    assert load_recipe(write(with_lines(SFT, "training", "max_steps: 1e3"))).training.arguments()["max_steps"] == 1000


def test_words_that_yaml_1_1_reads_as_booleans_stay_words() -> None:
    text = with_lines(SFT, "training", "eval_strategy: no", "save_strategy: no", "run_name: on", "bf16: yes")
    arguments = load_recipe(write(text)).training.arguments()
    assert arguments["eval_strategy"] == "no"
    assert arguments["save_strategy"] == "no"
    assert arguments["run_name"] == "on"
    assert arguments["bf16"] is True


def test_only_what_is_set_is_handed_to_the_trainer() -> None:
    arguments = load_recipe(write(with_lines(SFT, "training", "weight_decay: 0.01"))).training.arguments()
    assert set(arguments) == {*OwnTrainingSettings.model_fields, "weight_decay"}


def test_recipe_cannot_be_changed() -> None:
    recipe = load_recipe(write(SFT))
    with pytest.raises(ValueError, match="frozen"):
        recipe.data = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.output_dir = "elsewhere"


def test_anchors_and_merge_keys_work_and_overrides_touch_one_place_only() -> None:
    text = DISTIL.replace("student:\n", "student: &side\n  dtype: float32\n").replace(
        "teacher:\n", "teacher:\n  <<: *side\n"
    )
    recipe = load_recipe(write(text), ["student.dtype=bfloat16"])
    assert recipe.teacher is not None
    assert (recipe.student.dtype, recipe.teacher.dtype) == ("bfloat16", "float32")
    assert recipe.teacher.model == "org/teacher"


def test_byte_order_mark_and_comments() -> None:
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf# comment\n" + SFT.encode())
    assert load_recipe("bom.yaml").student.model == "org/student"


# --- refused ---------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, str, str]] = [
    # (recipe, place and key, words that must stand in the sentence)
    (
        with_lines(DISTIL, "objective", "temprature: 2"),
        "recipe.yaml:8: objective.temprature",
        "did you mean 'temperature'?",
    ),
    (with_lines(DISTIL, "objective", "temperature: 0"), "recipe.yaml:8: objective.temperature", "greater than 0"),
    (with_lines(DISTIL, "objective", "divergence: foward"), "objective.divergence", "did you mean 'forward'?"),
    (with_lines(DISTIL, "objective", "kd_weight: true"), "objective.kd_weight", "a number, but true was given"),
    (with_lines(DISTIL, "objective", "gan: {hidden: 3}"), "objective.gan.hidden", "did you mean 'hidden_size'?"),
    (
        with_lines(DISTIL, "objective", "matching: none", "gan: {hidden_size: 3}"),
        "objective",
        "no effect with matching",
    ),
    (DISTIL.replace("dskd_cma", "dskd_cme"), "recipe.yaml:8: objective.name", "did you mean 'dskd_cma'?"),
    (DISTIL.replace("dskd_cma", "no.such.module"), "objective.name", "cannot be imported"),
    (DISTIL.replace("  name: dskd_cma", "  kd_weight: 0.1"), "objective.name", "is missing"),
    (DISTIL.replace("  name: dskd_cma", "  name: 3"), "objective.name", "is missing"),
    (DISTIL.replace("objective:\n  name: dskd_cma", "objective: dskd_cma"), "objective", "must be a section"),
    (DISTIL.replace("teacher:\n  model: org/teacher\n", ""), "objective.name", "needs a teacher"),
    (with_lines(SFT, "objective", "temperature: 2"), "objective.temperature", "no settings of its own"),
    (SFT.replace("training:", "trainning:"), "recipe.yaml:7: trainning", "did you mean 'training'?"),
    (SFT.replace("training:\n  output_dir: runs/sft\n", ""), "recipe.yaml: training", "is missing"),
    (SFT.replace("  output_dir: runs/sft", "  seed: 1"), "recipe.yaml:7: training.output_dir", "is missing"),
    (with_lines(SFT, "training", "learning_rat: 1"), "training.learning_rat", "did you mean 'learning_rate'?"),
    (with_lines(SFT, "training", "learning_rate: -1"), "training.learning_rate", "greater than 0, but -1 was given"),
    (with_lines(SFT, "training", "learning_rate: 0"), "training.learning_rate", "greater than 0"),
    (with_lines(SFT, "training", "learning_rate: .nan"), "training.learning_rate", "a finite number"),
    (with_lines(SFT, "training", "learning_rate: .inf"), "training.learning_rate", "a finite number"),
    (with_lines(SFT, "training", "learning_rate: fast"), "training.learning_rate", "a number, but 'fast' was given"),
    (with_lines(SFT, "training", "learning_rate:"), "training.learning_rate", "a number, but nothing was given"),
    (with_lines(SFT, "training", "learning_rate: [1e-4]"), "training.learning_rate", "a number"),
    (with_lines(SFT, "training", "learning_rate: true"), "training.learning_rate", "a number, but true was given"),
    (with_lines(SFT, "training", "projector_learning_rate: 0"), "training.projector_learning_rate", "greater than 0"),
    (with_lines(SFT, "training", "num_train_epochs: -3"), "training.num_train_epochs", "greater than 0"),
    (with_lines(SFT, "training", "per_device_train_batch_size: 1.5"), "per_device_train_batch_size", "whole number"),
    (with_lines(SFT, "training", "gradient_accumulation_steps: 0"), "gradient_accumulation_steps", "at least 1"),
    (with_lines(SFT, "training", "max_steps: false"), "training.max_steps", "a number, but false was given"),
    (with_lines(SFT, "training", "bf16: maybe"), "training.bf16", "true or false, but 'maybe' was given"),
    (with_lines(SFT, "training", "lr_scheduler_type: cosin"), "lr_scheduler_type", "did you mean 'cosine'?"),
    (with_lines(SFT, "training", "optim: adamw_torchh"), "training.optim", "did you mean 'adamw_torch'?"),
    (with_lines(SFT, "training", "report_to: 5"), "training.report_to", "text or a list"),
    (with_lines(SFT, "training", "eval_strategy: steps"), "training.eval_strategy", "data.validation"),
    (with_lines(SFT, "training", "resume_from_checkpoint: x"), "training.resume_from_checkpoint", "--resume"),
    (with_lines(SFT, "training", "hub_token: hf_secret"), "training.hub_token", "hf auth login"),
    (with_lines(SFT, "data", "max_lenght: 9"), "recipe.yaml:2: data.max_lenght", "did you mean 'max_length'?"),
    (with_lines(SFT, "data", "max_length: 1"), "data.max_length", "at least 8"),
    (with_lines(SFT, "data", "limit: 0"), "data.limit", "at least 1"),
    (with_lines(SFT, "data", "streaming: true"), "data.streaming", "training.max_steps"),
    (SFT.replace("org/rows", "[]"), "data.train", "must be given"),
    (SFT.replace("org/rows", "[org/rows, 3]"), "data.train[1]", "text, but 3 was given"),
    (SFT.replace("org/rows", "{a: b}"), "data.train", "a list"),
    (SFT.replace("org/rows", "rows.jsonl"), "recipe.yaml:2: data.train", "'rows.jsonl', which does not exist"),
    (SFT.replace("org/rows", "[org/rows, ./rows]"), "data.train", "'./rows', which does not exist"),
    (SFT.replace("org/student", "student.gguf"), "student.model", "'student.gguf', which does not exist"),
    (SFT.replace("  model: org/student", "  dtype: float32"), "recipe.yaml:3: student.model", "is missing"),
    (SFT.replace("org/student", "5"), "student.model", "text, but 5 was given"),
    (SFT.replace("org/student", "''"), "student.model", "must be given"),
    (with_lines(SFT, "student", "dtype: bfloat"), "student.dtype", "did you mean 'bfloat16'?"),
    (with_lines(SFT, "student", "lora: {rank: 4}"), "student.lora.rank", "is unknown. Accepted: r, alpha"),
    (with_lines(SFT, "student", "lora: {r: 0}"), "student.lora.r", "at least 1"),
    (with_lines(SFT, "student", "lora: 16"), "student.lora", "a mapping"),
    (with_lines(SFT, "student", "quantization: 4bit"), "student.quantization", "the student is trained"),
    (with_lines(DISTIL, "teacher", "lora: {r: 4}"), "teacher.lora", "the teacher is not trained"),
    (SFT.replace("runs/sft", "org/student"), "training.output_dir", "the student's own folder"),
    (DISTIL.replace("runs/distil", "./org/../org/teacher"), "training.output_dir", "the teacher's own folder"),
    (with_lines(DISTIL, "evaluation", "temperature: -1"), "evaluation.temperature", "at least 0"),
    (with_lines(DISTIL, "evaluation", "top_p: 0"), "evaluation.top_p", "greater than 0"),
    (with_lines(DISTIL, "evaluation", "seeds: [10, 10]"), "evaluation.seeds", "10 is given twice"),
    (with_lines(DISTIL, "evaluation", "seeds: []"), "evaluation.seeds", "must be given"),
    (with_lines(DISTIL, "evaluation", "seeds: [ten]"), "evaluation.seeds[0]", "whole number, but 'ten' was given"),
    (with_lines(DISTIL, "evaluation", "in_domain: tests"), "evaluation.in_domain", "did you mean 'test'?"),
    (
        SFT.replace("student:\n  model: org/student", "student: org/student"),
        "recipe.yaml:3: student",
        "must be a section",
    ),
    (SFT.replace("student:\n  model: org/student", "student:"), "recipe.yaml:3: student", "must be a section"),
    (SFT + "  output_dir: runs/other\n", "recipe.yaml:9: training.output_dir", "given twice (first on line 8)"),
    (SFT + "data:\n  train: x\n", "recipe.yaml:9: data", "given twice (first on line 1)"),
    (with_lines(SFT, "training", "lr_scheduler_kwargs: {a: 1, a: 2}"), "lr_scheduler_kwargs.a", "given twice"),
    (SFT + "3: x\n", "recipe.yaml:9: the key '3'", "must be text"),
    (SFT.replace("  model: org", "  modle: org"), "student.modle", "did you mean 'model'?"),
    (SFT + "  bad indent: [\n", "recipe.yaml:1", "not valid YAML"),
    (SFT.replace("runs/sft", "'runs"), "recipe.yaml:", "not valid YAML"),
    (SFT.replace("runs/sft", "!!python/object:os.system x"), "recipe.yaml:8", "not valid YAML"),
    ("", "recipe.yaml", "must hold sections"),
    ("- data\n", "recipe.yaml", "must hold sections"),
    ("just words\n", "recipe.yaml", "must hold sections"),
]


@pytest.mark.parametrize(("text", "key", "words"), BAD, ids=[f"{key}-{words}"[:60] for _, key, words in BAD])
def test_bad_recipe_is_refused_in_one_sentence(text: str, key: str, words: str) -> None:
    message = refusal(text)
    assert message.startswith("recipe.yaml")
    assert key in message
    assert words in message
    assert len(message.splitlines()) == 1
    assert not re.search(r"pydantic|validation error|input_value|Input should|\[type=|Traceback", message)


def test_bad_table_really_differs_from_the_good_recipes() -> None:
    assert all(text not in (SFT, DISTIL) for text, _, _ in BAD)
    assert len(BAD) >= 25


def test_every_problem_is_reported_in_the_order_of_the_file() -> None:
    text = with_lines(with_lines(SFT, "training", "seed: x", "bf16: x"), "data", "limit: x", "streming: true")
    lines = refusal(text + "extra: {}\n").splitlines()
    keys = [line.split()[1] for line in lines]
    assert keys == ["data.limit", "data.streming", "training.seed", "training.bf16", "extra"]


def test_impossible_pairs_are_reported_beside_other_problems() -> None:
    message = refusal(with_lines(DISTIL.replace("teacher:\n  model: org/teacher\n", ""), "training", "seed: x"))
    assert "needs a teacher" in message
    assert "training.seed" in message


def test_refusals_of_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^missing\.yaml: the recipe cannot be read: No such file"):
        load_recipe("missing.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_recipe(folder)
    Path("latin.yaml").write_bytes(b"data: \xff\xfe\xe9")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        load_recipe("latin.yaml")


@pytest.mark.parametrize("data", [["a/test", "b/test"], ["a/test", "b/dev"], ["org/rows", "x/y/rows", "test"]])
def test_names_of_evaluation_files_are_those_that_the_evaluation_uses(data: list[str]) -> None:
    from vocabridge.evaluation.plan import named_sources

    values = yaml.safe_load(DISTIL)
    names = list(named_sources(data))
    values["evaluation"] = {"data": data, "in_domain": names}
    assert recipe_from_values(values).evaluation is not None
    values["evaluation"]["in_domain"] = ["wrong"]
    with pytest.raises(UserError, match=rf"evaluation\.in_domain names 'wrong'.* Known: {', '.join(names)}\."):
        recipe_from_values(values)


@pytest.mark.parametrize("installed", [True, False])
def test_an_engine_that_is_not_there_is_told_before_training(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    values = yaml.safe_load(DISTIL)
    values["evaluation"] |= {"engine": "vllm", "dtype": "bfloat16"}
    if installed:
        evaluation = recipe_from_values(values).evaluation
        assert evaluation is not None
        assert (evaluation.engine, evaluation.dtype) == ("vllm", "bfloat16")
    else:
        with pytest.raises(UserError, match=r"evaluation\.engine is 'vllm', but that package is not installed"):
            recipe_from_values(values)


def test_values_of_a_library_caller_are_checked_alike() -> None:
    values = yaml.safe_load(SFT)
    assert recipe_from_values(values).student.model == "org/student"
    values["training"]["sed"] = 3
    before = copy.deepcopy(values)
    with pytest.raises(UserError, match=r"^my grid: training\.sed is unknown; did you mean 'seed'\?"):
        recipe_from_values(values, source="my grid")
    assert values == before


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_replace_add_and_remove() -> None:
    recipe = load_recipe(
        write(DISTIL),
        [
            "training.learning_rate=5e-4",
            "student.lora.r=8",
            "data.train=[org/a, org/b]",
            "objective={name: cross_entropy}",
            "teacher=null",
            "evaluation.seeds=[1]",
            "training.run_name=a=b",
        ],
    )
    assert recipe.training.arguments()["learning_rate"] == 5e-4
    assert recipe.student.lora is not None
    assert recipe.student.lora.r == 8
    assert recipe.data.train == ("org/a", "org/b")
    assert recipe.objective.name == "cross_entropy"
    assert recipe.teacher is None
    assert recipe.evaluation is not None
    assert recipe.evaluation.seeds == (1,)
    assert recipe.training.arguments()["run_name"] == "a=b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learnig_rate=1", "command line: training.learnig_rate is unknown; did you mean 'learning_rate'?"),
        ("objective.temperature=hot", "command line: objective.temperature must be a number, but 'hot' was given."),
        ("trainng.seed=1", "command line: trainng is unknown; did you mean 'training'?"),
        ("seed", "command line: 'seed' is no override; write section.key=value."),
        ("=3", "command line: '=3' is no override"),
        ("a..b=3", "command line: 'a..b=3' is no override"),
        ("training.seed=[1", "command line: training.seed: the value '[1' is not valid YAML"),
        ("student.model.x=1", "command line: 'student.model.x=1': student.model is a value, it has no keys."),
        ("data.train=nowhere.jsonl", "command line: data.train names 'nowhere.jsonl', which does not exist."),
    ],
)
def test_bad_override_is_told_to_come_from_the_command_line(override: str, words: str) -> None:
    message = refusal(DISTIL, override)
    assert message.startswith(words)
    assert len(message.splitlines()) == 1


def test_override_mends_the_file() -> None:
    assert (
        load_recipe(write(with_lines(SFT, "training", "seed: x")), ["training.seed=3"]).training.arguments()["seed"]
        == 3
    )


# --- paths -----------------------------------------------------------------------------------------------------------


def test_relative_paths_are_taken_from_the_recipes_folder_first(folder: Path) -> None:
    (folder / "project" / "data").mkdir(parents=True)
    (folder / "data").mkdir()
    for place in ("project/data/both.jsonl", "data/both.jsonl", "project/data/near.jsonl", "data/here.jsonl"):
        (folder / place).write_text("{}\n", encoding="utf-8")
    (folder / "project" / "student").mkdir()
    text = SFT.replace("org/rows", "[data/both.jsonl, data/near.jsonl, data/here.jsonl, org/hub]")
    write(text.replace("org/student", "student"), "project/recipe.yaml")
    recipe = load_recipe("project/recipe.yaml")
    expected = ["project/data/both.jsonl", "project/data/near.jsonl", "data/here.jsonl"]
    assert recipe.data.train == (*(str(folder / name) for name in expected), "org/hub")
    assert recipe.student.model == str(folder / "project" / "student")
    assert recipe.training.output_dir == "runs/sft"


def test_paths_in_overrides_are_taken_from_the_current_folder(folder: Path) -> None:
    (folder / "project").mkdir()
    for place in ("project/rows.jsonl", "rows.jsonl"):
        (folder / place).write_text("{}\n", encoding="utf-8")
    write(SFT, "project/recipe.yaml")
    assert load_recipe("project/recipe.yaml", ["data.train=rows.jsonl"]).data.train == (str(folder / "rows.jsonl"),)


def test_split_of_a_dataset_folder_keeps_its_name(folder: Path) -> None:
    (folder / "saved").mkdir()
    assert load_recipe(write(SFT.replace("org/rows", "saved:train"))).data.train == (f"{folder / 'saved'}:train",)
    assert load_recipe(write(SFT.replace("org/rows", "org/rows:train"))).data.train == ("org/rows:train",)
