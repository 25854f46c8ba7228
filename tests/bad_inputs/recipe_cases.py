"""Recipes and study files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bad_inputs.cases import BadInput, nothing, set_in_recipe, with_overrides
from bad_inputs.workplace import change_yaml, good_recipe, replace

RECIPE = "recipe.yaml"


def in_text(name: str, old: str, new: str, *says: str) -> BadInput:
    return BadInput(name, says, lambda folder: replace(folder / RECIPE, old, new))


def as_bytes(name: str, content: bytes, *says: str) -> BadInput:
    return BadInput(name, says, lambda folder: (folder / RECIPE).write_bytes(content))


def in_study(name: str, *says: str, **changes: Any) -> BadInput:
    return BadInput(name, says, lambda folder: change_yaml(folder / "study.yaml", **changes), ("study", "study.yaml"))


def own_objective(name: str, code: str, *says: str) -> BadInput:
    def spoil(folder: Path) -> None:
        (folder / "own").mkdir()
        (folder / "own" / "objective.py").write_text(code)
        change_yaml(folder / RECIPE, objective={"name": "own.objective"})

    return BadInput(name, says, spoil)


def steps_file(folder: Path) -> None:
    (folder / "run").write_text("something else")


def leads_in_a_circle(folder: Path) -> None:
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    change_yaml(folder / RECIPE, data__train="loop.jsonl")


FILES = [
    BadInput("no such file", ("nowhere.yaml", "cannot be read: No such file"), nothing, ("distill", "nowhere.yaml")),
    BadInput("a folder", ("student", "cannot be read: Is a directory"), nothing, ("validate", "student")),
    as_bytes("empty", b"", "recipe.yaml", "must hold sections"),
    as_bytes("Latin-1", "data: {train: caf\u00e9.jsonl}".encode("latin-1"), "recipe.yaml", "not a UTF-8 text file"),
    in_text("a tab", "  max_length: 64", "\tmax_length: 64", "recipe.yaml:3", "not valid YAML"),
    in_text("a key twice", "  max_length: 64", "  train: x\n  max_length: 64", "recipe.yaml:3", "twice", "keep one"),
    in_text("section misspelled", "teacher:", "techer:", "recipe.yaml:7", "techer", "did you mean 'teacher'"),
    in_text("key misspelled", "max_length: 64", "max_lenght: 64", "recipe.yaml:3", "did you mean 'max_length'"),
    in_text("section is a word", "data:\n  train: train.jsonl\n  max_length: 64", "data: train.jsonl", ":1", "section"),
    BadInput(
        "section missing",
        ("recipe.yaml: training is missing", "needs this section"),
        lambda folder: change_yaml(folder / RECIPE, training=None),
    ),
]

NUMBERS = [
    set_in_recipe("training.learning_rate: negative", -0.1, "recipe.yaml:20", "greater than 0", "-0.1"),
    set_in_recipe("training.learning_rate: NaN", float("nan"), "recipe.yaml:20: training.learning_rate", "finite"),
    set_in_recipe("training.learning_rate: a word", "fast", "training.learning_rate must be a number", "'fast'"),
    set_in_recipe("training.save_total_limit: negative", -3, "save_total_limit must be at least 1, but -3 was given"),
    set_in_recipe("training.eval_delay: negative", -5, "training.eval_delay must be at least 0, but -5 was given"),
    set_in_recipe(
        "training.ddp_timeout: negative", -1, "training.ddp_timeout must be greater than 0, but -1 was given"
    ),
    set_in_recipe(
        "training.dataloader_prefetch_factor: 0",
        0,
        "training.dataloader_prefetch_factor must be at least 1, but 0 was given",
        training__dataloader_num_workers=2,
    ),
    set_in_recipe("training.per_device_train_batch_size: endless", 10**20, "train_batch_size", "at most 4294967295"),
    set_in_recipe("data.limit: endless", 10**20, "recipe.yaml:", "data.limit", "at most 4294967295"),
    set_in_recipe("training.log_level: unknown", "loud", "training.log_level", "'warning'", "'loud'"),
    set_in_recipe("training.adam_beta1: beyond 1", 2.0, "training.adam_beta1 must be less than 1", "2.0"),
    set_in_recipe("training.seed: beyond 32 bits", 2**64, "training.seed must be at most 4294967295"),
    set_in_recipe("training.max_steps: zero", 0, "training.max_steps is 0", "leave it out"),
    set_in_recipe("training.max_steps: negative", -5, "training.max_steps must be at least -1"),
    set_in_recipe("training.per_device_train_batch_size: true", True, "must be a number", "true was given"),
    set_in_recipe("data.max_length: too short", 4, "recipe.yaml:3: data.max_length must be at least 8"),
    set_in_recipe("objective.kd_weight: beyond 1", 1.5, "objective.kd_weight must be at most 1", "1.5"),
    set_in_recipe("evaluation.seeds: one twice", [1, 1], "evaluation.seeds is refused: 1 is given twice"),
    with_overrides(
        "a budget below one row",
        "training.max_tokens_per_batch is 3, but one row alone has",
        "give at least",
        overrides=("training={output_dir: run, max_steps: 2, use_cpu: true, max_tokens_per_batch: 3}",),
    ),
]

NAMES = [
    set_in_recipe("objective.name: unknown", "dskd_cmaa", "recipe.yaml:11", "unknown; did you mean 'dskd_cma'"),
    set_in_recipe("objective.temprature", 2.0, "objective.temprature is unknown", "Accepted:"),
    BadInput(
        "an objective's terms are empty",
        ("objective.terms must be a list",),
        lambda folder: change_yaml(folder / RECIPE, objective={"terms": []}),
    ),
    BadInput(
        "a term weighs nothing",
        ("objective.terms[0].weight must be a number greater than 0",),
        lambda folder: change_yaml(folder / RECIPE, objective={"terms": [{"name": "alm", "weight": 0}]}),
    ),
    set_in_recipe("objective.name: a module that is not there", "my_thing.objective", "objective.name cannot be used"),
    own_objective(
        "an own objective with a syntax error", "def (", "cannot be imported: SyntaxError", "objective.py, line 1"
    ),
    set_in_recipe("student.dtype: unknown", "float8", "student.dtype must be one of 'auto', 'float32'", "'float8'"),
    set_in_recipe("training.optim: package missing", "adamw_bnb_8bit", "training.optim: You need to install"),
    set_in_recipe("training.report_to: package missing", "wandb", "requires wandb to be installed"),
    set_in_recipe("training.accelerator_config: unknown key", {"nonsense": 1}, "training: ", "'nonsense'", "leave out"),
    set_in_recipe("training.hub_token", "hf_secret", "cannot be set in a recipe", "hf auth login"),
    set_in_recipe("training.hub_strategy", "checkpoint", "training.hub_strategy cannot be set", "finished run, once"),
    set_in_recipe("training.hub_always_push", True, "training.hub_always_push cannot be set", "finished run, once"),
    set_in_recipe("training.enable_jit_checkpoint", True, "enable_jit_checkpoint cannot be set", "SIGTERM saves"),
    set_in_recipe("training.auto_find_batch_size", True, "auto_find_batch_size cannot be set", "vocabridge plan"),
    set_in_recipe("training.save_on_each_node", True, "save_on_each_node cannot be set", "first process writes"),
    set_in_recipe("training.average_tokens_across_devices", False, "across_devices cannot be set", "of all processes"),
    set_in_recipe("evaluation.in_domain: unknown", ["dolly"], "names 'dolly'", "no data file", "Known: test"),
    set_in_recipe("data.train: no such file", "tarin.jsonl", "recipe.yaml:2: data.train names", "does not exist"),
    set_in_recipe("data.train: nothing", [], "recipe.yaml:2: data.train must be given"),
    set_in_recipe("data.train: a name with NUL", "a\0b", "recipe.yaml:2: data.train", "a character that no name has"),
]

CONFLICTS = [
    set_in_recipe("training.fp16: on a CPU", True, "training: fp16 is for accelerators", "bf16"),
    set_in_recipe("student.dtype: float16", "float16", "student.dtype is 'float16'", "vanish", "leave it out"),
    BadInput(
        "no teacher for an objective that needs one",
        ("recipe.yaml:8: objective.name 'dskd_cma' needs a teacher", "no 'teacher' section"),
        lambda folder: change_yaml(folder / RECIPE, teacher=None),
    ),
    set_in_recipe("teacher.lora", {"r": 4}, "teacher.lora has no meaning", "move it to student.lora"),
    set_in_recipe("student.quantization", "4bit", "student.quantization has no meaning", "remove it"),
    set_in_recipe("teacher.cache", "run/cache", "teacher.cache lies in the run folder", "name another folder"),
    set_in_recipe("teacher.device", "cuda:3", "teacher.device is 'cuda:3'", "leave it out"),
    set_in_recipe("training.eval_strategy: without data", "steps", "data.validation names no data"),
    set_in_recipe("training.load_best_model_at_end: without data", True, "needs training.eval_strategy"),
    set_in_recipe(
        "training.metric_for_best_model: unknown",
        "eval_student_acuracy",
        "training.metric_for_best_model is 'student_acuracy'",
        "did you mean 'student_accuracy'?",
        "Known: attention_in_chunk, ",
        data__validation="test.jsonl",
        training__eval_strategy="epoch",
    ),
    with_overrides(
        "a stream without an end",
        "data.streaming needs training.max_steps",
        overrides=("data.streaming=true", "training={output_dir: run, use_cpu: true}"),
    ),
    set_in_recipe("training.dataloader_persistent_workers: without workers", True, "num_workers > 0", "leave out"),
    set_in_recipe("training.lr_scheduler_kwargs: unknown", {"nonsense": 1}, "lr_scheduler_kwargs", "'nonsense'"),
    set_in_recipe(
        "training.gradient_checkpointing_kwargs: unknown",
        {"nonsense": 1},
        "gradient_checkpointing_kwargs",
        "nonsense",
        training__gradient_checkpointing=True,
    ),
    set_in_recipe("training.label_smoothing_factor", 0.1, "training: label_smoothing_factor", "leave it out"),
    set_in_recipe("training.use_liger_kernel", True, "training: use_liger_kernel", "leave it out"),
    set_in_recipe("training.liger_kernel_config", {"rope": True}, "training: liger_kernel_config", "leave it out"),
    set_in_recipe("training.optim_target_modules", "all-linear", "training: optim_target_modules", "leave it out"),
    set_in_recipe("training.label_names", ["labels"], "training: label_names", "leave it out"),
    set_in_recipe("training.include_for_metrics", ["loss"], "training: include_for_metrics", "leave it out"),
    set_in_recipe("training.batch_eval_metrics", True, "training: batch_eval_metrics", "leave it out"),
    set_in_recipe("training.bf16: and fp16", True, "At most one of fp16 and bf16", "leave out", training__fp16=True),
    set_in_recipe("training.tf32: on a CPU", True, "training: --tf32 requires", "leave out"),
    set_in_recipe("training.fsdp: without a launcher", "full_shard", "training.fsdp needs processes", "torchrun"),
    set_in_recipe("evaluation.max_new_tokens: beyond the context", 256, "max_new_tokens is 256", "lower it"),
]

FOLDERS = [
    set_in_recipe("training.output_dir: the data", "train.jsonl", "training.output_dir", "choose another"),
    set_in_recipe("training.output_dir: below a file", "test.jsonl/run", "training.output_dir", "Not a directory"),
    set_in_recipe("training.output_dir: where none can be", "/proc/run", "training.output_dir", "name another folder"),
    BadInput("data.train: a link to itself", ("data.train names 'loop.jsonl'", "does not exist"), leads_in_a_circle),
    BadInput("training.output_dir: a file", ("training.output_dir: run is a file; name a folder",), steps_file),
]

STUDIES = [
    in_study("study: base missing", "study.yaml:1: base is 'nowhere.yaml', which is no file", base="nowhere.yaml"),
    in_study("study: baseline unknown", "baseline is 'plan'", "did you mean 'plain'", baseline="plan"),
    in_study(
        "study: output_dir is a model", "study.yaml:2: output_dir is the folder of the model", output_dir="student"
    ),
    BadInput(
        "study: its runs are pushed",
        ("study.yaml:1: base or a variant sets training.push_to_hub", "overwrite each other", "hf upload"),
        lambda folder: change_yaml(folder / RECIPE, training__push_to_hub=True),
        ("study", "study.yaml"),
    ),
    in_study("study: a seed twice", "study.yaml:4: seeds is refused: 1 is given twice", seeds=[1, 1]),
    in_study("study: a variant's name leads out", "no variant's name", variants={"plain": None, "../x": None}),
    in_study(
        "study: a variant's key misspelled",
        "study.yaml:11: variants.kd: training.sed is unknown",
        variants={"plain": {"teacher": None, "objective": {"name": "cross_entropy"}}, "kd": {"training.sed": 1}},
    ),
    in_study(
        "study: a variant sets the seed", "cannot be changed by a variant", variants={"plain": {"training.seed": 3}}
    ),
    BadInput(
        "study: a recipe given as one",
        ("recipe.yaml", "base is missing"),
        nothing,
        ("study", "recipe.yaml"),
        num_sentences=10,
    ),
]

RECIPES = [*FILES, *NUMBERS, *NAMES, *CONFLICTS, *FOLDERS, *STUDIES]

assert good_recipe()["training"]["max_steps"] == 2, "the lines above count from here"
