"""The launcher's configs mean to accelerate what they say, and what cannot train is refused in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from transformers import AutoModelForCausalLM, TrainingArguments

import sharded_cases as cases
from tiny_pair import ROWS, save_pair
from vocabridge.errors import UserError
from vocabridge.recipe import recipe_from_values
from vocabridge.sharding import check_engine, fsdp_plugin
from vocabridge.training_arguments import DistillationConfig

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))}


def launcher_arguments(path):
    """As ``accelerate launch --config_file PATH`` reads them."""
    parser = launch_command_parser()
    given = ["--config_file", str(path), "--main_process_ip", "10.0.0.1", "-m", "vocabridge", "distill", "recipe.yaml"]
    arguments, *_ = _validate_launch_command(parser.parse_args(given))
    return arguments


@pytest.fixture
def engine_environment(monkeypatch):
    """Sets what a launcher would, and takes back what accelerate itself puts into the environment."""
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")

    def enter(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return enter


def arguments(tmp_path, **options):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)


# --- configs ----------------------------------------------------------------------------------------------------------


def test_there_is_a_config_for_each_way_to_scale():
    assert set(CONFIGS) == {
        "single_gpu",
        "ddp",
        "fsdp2",
        "fsdp2_two_nodes",
        "deepspeed_zero2",
        "deepspeed_zero3",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_knows_every_key(name):
    values = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    ClusterConfig.from_yaml_file(str(CONFIGS[name]))  # refuses unknown keys of the first level
    known = {action.dest for action in launch_command_parser()._actions}
    nested = {key for section in ("fsdp_config", "deepspeed_config") for key in values.get(section, {})}
    assert nested <= known, f"accelerate launch has no {sorted(nested - known)}"
    assert values["mixed_precision"] == "no", "the recipe says it, so that it is on record"


@pytest.mark.parametrize(
    ("name", "processes", "machines"),
    [
        ("single_gpu", 1, 1),
        ("ddp", 8, 1),
        ("fsdp2", 8, 1),
        ("fsdp2_two_nodes", 16, 2),
        ("deepspeed_zero2", 8, 1),
        ("deepspeed_zero3", 8, 1),
    ],
)
def test_the_launcher_starts_so_many_processes(name, processes, machines):
    read = launcher_arguments(CONFIGS[name])
    assert (read.num_processes, read.num_machines) == (processes, machines)
    assert read.use_fsdp == name.startswith("fsdp2")
    assert read.multi_gpu == (name == "ddp")
    assert read.use_deepspeed == name.startswith("deepspeed")
    if name == "single_gpu":
        command, environment = prepare_simple_launcher_cmd_env(read)
        assert command[1:] == ["-m", "vocabridge", "distill", "recipe.yaml"]
        assert "WORLD_SIZE" not in environment


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_two_nodes"])
def test_fsdp_configs_reach_the_trainer_and_are_taken(name, tmp_path, engine_environment):
    given = prepare_multi_gpu_env(launcher_arguments(CONFIGS[name]))
    engine_environment(**{key: value for key, value in given.items() if key.startswith(("FSDP_", "ACCELERATE_"))})
    plugin = fsdp_plugin(arguments(tmp_path))
    assert plugin is not None
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert "transformer_auto_wrap_policy" in repr(plugin.auto_wrap_policy)
    check_engine(arguments(tmp_path))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configs_reach_the_trainer(engine_environment, stage):
    given = cases.launch_environment(stage)
    wanted = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    assert wanted.items() <= given.items()
    assert given["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == given["ACCELERATE_GRADIENT_CLIPPING"] == "auto"


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        ({}, {"fsdp": True}, "torchrun"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "cpu_ram_efficient_loading"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "training.activation_checkpointing: true"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "bf16"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism_config"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(tmp_path, engine_environment, environment, options, message):
    engine_environment(**{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment})
    with pytest.raises(UserError, match=message):
        check_engine(arguments(tmp_path, **options))


def test_deepspeeds_own_optimizer_is_refused(tmp_path, engine_environment):
    given = arguments(tmp_path)
    given.deepspeed_plugin = object.__new__(DeepSpeedPlugin)
    given.deepspeed_plugin.deepspeed_config = {"zero_optimization": {"stage": 3}}
    check_engine(given)
    given.deepspeed_plugin.deepspeed_config |= {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    with pytest.raises(UserError, match=r"optimizer and scheduler would .* training\.optim and"):
        check_engine(given)


def test_without_a_launcher_nothing_is_sharded(tmp_path, engine_environment):
    given = arguments(tmp_path)
    check_engine(given)
    assert fsdp_plugin(given) is None


def test_without_a_launcher_no_teacher_is_shared(tmp_path):
    with pytest.raises(UserError, match="shard_teacher needs several processes, each with its piece: accelerate"):
        DistillationConfig(str(tmp_path), use_cpu=True, report_to="none", shard_teacher=True)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, "has nothing to share out, since the recipe has no 'teacher' section; remove it"),
        ({"teacher": {"model": "org/teacher", "cache": True}}, "has nothing to share out: with teacher.cache no layer"),
        ({"teacher": {"model": "org/teacher", "quantization": "4bit"}}, "cannot cut quantised weights into pieces"),
    ],
)
def test_a_teacher_that_cannot_be_shared_is_refused_in_the_recipe(sections, told):
    recipe = {
        "data": {"train": "org/rows"},
        "student": {"model": "org/student"},
        "objective": {"name": "cross_entropy"},
        "training": {"output_dir": "runs/x", "shard_teacher": True},
    }
    with pytest.raises(UserError, match=f"training.shard_teacher {told}"):
        recipe_from_values(recipe | sections)


def test_a_trainer_without_a_teacher_that_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vocabridge.training_arguments.check_shared_teacher", lambda args: None)  # one process is here
    with pytest.raises(UserError, match="shard_teacher needs a teacher that runs in floating point"):
        cases.trainer(tmp_path, "cross_entropy", num_processes=1, shard_teacher=True, teacher=False)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_accelerate_launch_trains_and_evaluates_an_adapter(
    tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, engine
):
    if engine == "DEEPSPEED" and not is_deepspeed_available():
        pytest.skip("DeepSpeed is not installed; see the end of 'make venv'")
    save_pair(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    recipe = {
        "data": {"train": "train.jsonl", "max_length": 128},
        "student": {"model": "student", "dtype": "float32", "lora": {"r": 4}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "objective": {"name": "dskd_cma"},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            "use_cpu": True,
            "ddp_backend": "gloo",
            "shard_teacher": engine == "FSDP",  # refused under DeepSpeed
        },
        "evaluation": {"data": "train.jsonl", "seeds": [10], "max_new_tokens": 4, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config, program = {
        "FSDP": ("fsdp2", ["-m", "vocabridge"]),
        "DEEPSPEED": ("deepspeed_zero3", [str(Path(__file__).with_name("vocabridge_on_gloo.py"))]),
    }[engine]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[config])]
    done = subprocess.run(
        [*launcher, "--num_processes", "2", "--main_process_port", "0", *program, "distill", "recipe.yaml"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (record["engine"], record["num_processes"]) == (engine, 2)
    assert json.loads((run / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    merged, base = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (run, tmp_path / "student"))
    assert merged.keys() == base.keys()
    assert any(not value.equal(base[name]) for name, value in merged.items())
