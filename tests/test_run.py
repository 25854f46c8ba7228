"""Whole runs from a recipe file, with tiny models in folders."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_pair import ROWS, save_pair
from vocabridge.checkpoint_files import checkpoints, seal
from vocabridge.errors import UserError
from vocabridge.recipe import load_recipe
from vocabridge.run import distill


@pytest.fixture
def recipe_file(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    save_pair(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    values = {
        "data": {"train": "train.jsonl", "max_length": 128},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "objective": {"name": "dskd_cma", "matching": "gan", "gan": {"hidden_size": 16}},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            "diagnostics_steps": 2,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def logged_losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    pairs = [(entry["step"], entry["loss"]) for entry in map(json.loads, lines) if "loss" in entry]
    assert len(dict(pairs)) == len(pairs), "a step stands twice in the log"
    return dict(pairs)


def test_run_folder_holds_everything(recipe_file, tmp_path):
    evaluation = [f"evaluation.{key}" for key in ("data=train.jsonl", "seeds=[1,2]", "max_new_tokens=4", "limit=3")]
    result = distill(load_recipe(recipe_file, [evaluation[0].replace("=", f"={tmp_path}/"), *evaluation[1:]]))
    run_dir = tmp_path / "run"
    assert (result.run_dir, result.interrupted, result.steps) == (run_dir, False, 4)
    for name in ["model.safetensors", "objective.safetensors", "README.md", "recipe.yaml", "run.json", "metrics.jsonl"]:
        assert (run_dir / name).is_file(), name
    assert not list(run_dir.rglob("*.bin")), "a pickle that a user would load"
    assert not (run_dir / ".saving").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run_dir), AutoTokenizer.from_pretrained(run_dir)
    text = tokenizer("Who jumps?\n", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=3, do_sample=False).shape[1] > text["input_ids"].shape[1]
    again = load_recipe(run_dir / "recipe.yaml")
    assert again.objective.terms[0].config.gan.hidden_size == 16
    record = json.loads((run_dir / "run.json").read_text())
    assert record["packages"]["torch"] == torch.__version__
    assert record["seed"] == 42
    assert result.evaluation.in_domain.bits_per_byte > 0
    scores = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert scores["in_domain"]["bits_per_byte"] > 0
    card = (run_dir / "README.md").read_text()
    assert "dskd_cma" in card
    assert "objective.safetensors" in card


def test_used_folder_is_not_touched_without_being_told(recipe_file, tmp_path):
    distill(load_recipe(recipe_file))
    before = logged_losses(tmp_path / "run")
    with pytest.raises(UserError, match="not empty; add --resume"):
        distill(load_recipe(recipe_file))
    with pytest.raises(UserError, match=r"other values of objective\.kd_weight"):
        distill(load_recipe(recipe_file, ["objective.kd_weight=0.9"]), resume=True)
    assert logged_losses(tmp_path / "run") == before
    distill(load_recipe(recipe_file), overwrite=True)
    assert logged_losses(tmp_path / "run") == before


def test_overwrite_deletes_runs_only_and_only_when_all_else_is_right(recipe_file, tmp_path):
    precious = tmp_path / "run"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="does not look like a run folder"):
        distill(load_recipe(recipe_file), overwrite=True)
    (precious / "run.json").write_text("{}")
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    with pytest.raises(UserError, match=r"broken\.jsonl:1"):
        distill(load_recipe(recipe_file, [f"data.train={tmp_path}/broken.jsonl"]), overwrite=True)
    assert (precious / "thesis.txt").exists()
    distill(load_recipe(recipe_file), overwrite=True)
    assert not (precious / "thesis.txt").exists()


@pytest.mark.parametrize("output_dir", ["student", ".", ".."])
def test_folders_that_hold_inputs_are_refused(recipe_file, tmp_path, monkeypatch, output_dir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"training\.output_dir"):
        load_recipe(recipe_file, [f"training.output_dir={output_dir}"])


def test_failed_start_leaves_nothing(recipe_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="own logits are not finite"):
        distill(load_recipe(recipe_file))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_full_disk_is_one_sentence_and_keeps_what_was_there(recipe_file, tmp_path):
    """A limit on file sizes makes the real writers fail as a full disk does: first safetensors, then torch.save."""
    distill(load_recipe(recipe_file))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    weights = (tmp_path / "run" / "model.safetensors").stat().st_size
    for limit in (weights // 2, weights + 4096):
        code = (
            f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "from vocabridge.cli import main; main()"
        )
        words = ["distill", str(recipe_file), "training.max_steps=6", "--resume"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "saving failed" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_output_dir_that_is_a_file(recipe_file, tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="is a file; name a folder"):
        distill(load_recipe(recipe_file, [f"training.output_dir={tmp_path}/taken"]))


def test_longer_training_resumes_from_the_last_checkpoint(recipe_file, tmp_path):
    constant = "training.lr_scheduler_type=constant"
    distill(load_recipe(recipe_file, [constant]))
    distill(load_recipe(recipe_file, [constant, "training.max_steps=6"]), resume=True)
    whole = tmp_path / "whole"
    distill(load_recipe(recipe_file, [constant, "training.max_steps=6", f"training.output_dir={whole}"]))
    assert logged_losses(tmp_path / "run") == logged_losses(whole)


def test_resuming_a_finished_run_trains_no_further(recipe_file, tmp_path):
    """Step 3 is in the middle of an epoch, where the base trainer would take one step too many."""
    options = ["training.max_steps=3", "training.lr_scheduler_type=constant", "training.save_steps=3"]
    distill(load_recipe(recipe_file, options))
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    before = {name: value.clone() for name, value in before.items()}
    result = distill(load_recipe(recipe_file, options), resume=True)
    assert result.steps == 3
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert list(logged_losses(tmp_path / "run")) == [1, 2, 3]


def test_a_run_without_a_checkpoint_begins_its_log_anew(recipe_file, tmp_path):
    """As one that was killed before its first checkpoint."""
    options = ["training.save_strategy=no"]
    distill(load_recipe(recipe_file, options))
    log = tmp_path / "run" / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    distill(load_recipe(recipe_file, options), resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == steps


def test_optimizer_settings_cannot_change_on_resume(recipe_file):
    distill(load_recipe(recipe_file))
    with pytest.raises(UserError, match=r"other values of training\.learning_rate"):
        distill(load_recipe(recipe_file, ["training.learning_rate=1e-2", "training.max_steps=6"]), resume=True)


def test_a_setting_that_is_new_since_a_run_began_stands_at_its_default(recipe_file, tmp_path):
    distill(load_recipe(recipe_file))
    recorded = tmp_path / "run" / "recipe.yaml"
    recorded.write_text(recorded.read_text().replace("  pad_to_multiple_of: null\n", ""))
    assert "pad_to_multiple_of" not in recorded.read_text()
    with pytest.raises(UserError, match=r"other values of training\.pad_to_multiple_of"):
        distill(load_recipe(recipe_file, ["training.pad_to_multiple_of=8", "training.max_steps=6"]), resume=True)
    distill(load_recipe(recipe_file, ["training.max_steps=6"]), resume=True)


def loosely(losses):
    """Sums over other batches differ in their last digits."""
    return pytest.approx(losses, rel=1e-4)


def change_step_rows(run_dir, content):
    """Of the last checkpoint, whose record then says that all is well; None as of an older version."""
    checkpoint = checkpoints(run_dir)[-1]
    path = checkpoint / "step_rows.json"
    assert json.loads(path.read_text()) == {"rows of an optimizer step": 4}
    path.unlink() if content is None else path.write_text(json.dumps(content))
    seal(checkpoint)


LONGER = ["training.max_steps=6", "training.lr_scheduler_type=constant"]


def test_batches_may_be_cut_smaller_on_resume_if_a_step_has_the_same_rows(recipe_file, tmp_path):
    options = [*LONGER, "objective.gan.dropout=0.0"]
    distill(load_recipe(recipe_file, [*options, f"training.output_dir={tmp_path}/whole"]))
    distill(load_recipe(recipe_file, [*options, "training.max_steps=2"]))
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    options.append("training.per_device_train_batch_size=2")
    with pytest.raises(UserError) as refusal:
        distill(load_recipe(recipe_file, options), resume=True)
    assert "checkpoint-2 was written after steps of 4 rows, and now a step would hold 2" in str(refusal.value)
    assert "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2" in str(refusal.value)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    distill(load_recipe(recipe_file, [*options, "training.gradient_accumulation_steps=2"]), resume=True)
    assert logged_losses(tmp_path / "run") == loosely(logged_losses(tmp_path / "whole"))
    assert "gradient_accumulation_steps: 2" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_checkpoint_of_other_steps_is_refused_unless_it_is_the_end(recipe_file, tmp_path):
    """As one that twice as many processes wrote, with the same recipe."""
    options = ["training.lr_scheduler_type=constant"]
    distill(load_recipe(recipe_file, options))
    losses = logged_losses(tmp_path / "run")
    change_step_rows(tmp_path / "run", {"rows of an optimizer step": 8})
    with pytest.raises(UserError, match=r"steps of 8 rows.*per_device_train_batch_size=4 training\.\w+_steps=2"):
        distill(load_recipe(recipe_file, LONGER), resume=True)
    assert distill(load_recipe(recipe_file, options), resume=True).steps == 4
    assert logged_losses(tmp_path / "run") == losses
    with pytest.raises(UserError, match=r"other values of training\.per_device_train_batch_size"):
        distill(load_recipe(recipe_file, [*options, "training.per_device_train_batch_size=8"]), resume=True)


def test_a_checkpoint_that_does_not_tell_its_steps_is_taken_with_the_same_batches(recipe_file, tmp_path):
    distill(load_recipe(recipe_file, ["training.lr_scheduler_type=constant"]))
    change_step_rows(tmp_path / "run", None)
    smaller = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    with pytest.raises(UserError, match=r"other values of training\.gradient_accumulation_steps, training\.per_device"):
        distill(load_recipe(recipe_file, [*LONGER, *smaller]), resume=True)
    assert distill(load_recipe(recipe_file, LONGER), resume=True).steps == 6


@pytest.mark.parametrize("save_total_limit", [1, 3])
def test_the_last_checkpoint_knows_the_evaluation_at_the_end_of_its_epoch(recipe_file, monkeypatch, save_total_limit):
    """So a run that is over is not trained, evaluated or refused again when it is resumed."""
    monkeypatch.chdir(recipe_file.parent)
    options = ["data.validation=train.jsonl", "training.eval_strategy=epoch", "training.metric_for_best_model=loss"]
    options += [
        f"training.save_total_limit={save_total_limit}",
        "training.save_strategy=steps",
        "training.save_steps=2",
    ]
    distill(load_recipe(recipe_file, options))
    state = json.loads(Path("run/checkpoint-4/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4]
    log = Path("run/metrics.jsonl").read_text()
    assert distill(load_recipe(recipe_file, options), resume=True).steps == 4
    assert Path("run/metrics.jsonl").read_text() == log, "nothing was trained or evaluated again"


@pytest.mark.parametrize("evaluated", [(), ("data.validation=train.jsonl", "training.eval_strategy=epoch")])
def test_checkpoints_of_weights_alone_end_a_run_and_start_none(recipe_file, tmp_path, monkeypatch, evaluated):
    """Also where the last one was written before the evaluation at the epoch's end, as ``save_steps`` does."""
    monkeypatch.chdir(tmp_path)
    options = ["training.save_only_model=true", "training.lr_scheduler_type=constant", *evaluated]
    distill(load_recipe(recipe_file, options))
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint-4 lacks optimizer\.pt, scheduler\.pt, rng_state\*\.pth, as with"):
        distill(load_recipe(recipe_file, [*options, "training.max_steps=6"]), resume=True)
    assert contents(tmp_path / "run") == before
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    (tmp_path / "run" / "model.safetensors").unlink()
    assert distill(load_recipe(recipe_file, options), resume=True).steps == 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    "change", ["save_only_model=true", "dataloader_drop_last=true", "dataloader_num_workers=1"], ids=str
)
def test_what_a_resumption_stands_on_cannot_change(recipe_file, change):
    """The last one of streams alone: their rows come in an order that depends on it."""
    options = ["data.streaming=true"] if "workers" in change else []
    distill(load_recipe(recipe_file, [*options, "training.max_steps=2"]))
    name = change.partition("=")[0]
    with pytest.raises(UserError, match=rf"other values of training\.{name};"):
        distill(load_recipe(recipe_file, [*options, f"training.{change}"]), resume=True)


def test_a_stream_with_workers_resumes_in_its_place(recipe_file, tmp_path):
    options = ["data.streaming=true", "training.dataloader_num_workers=2", "training.lr_scheduler_type=constant"]
    options += ["training.per_device_train_batch_size=2", "training.diagnostics_steps=0"]
    distill(load_recipe(recipe_file, [*options, f"training.output_dir={tmp_path}/whole"]))
    distill(load_recipe(recipe_file, [*options, "training.max_steps=2"]))
    smaller = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"]
    with pytest.raises(UserError, match=r"rows of a batch over all processes 2, .*now: .* 1, "):
        distill(load_recipe(recipe_file, [*options, *smaller]), resume=True)
    distill(load_recipe(recipe_file, options), resume=True)
    assert logged_losses(tmp_path / "run") == logged_losses(tmp_path / "whole")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_worker_that_dies_while_a_batch_is_fetched_is_told(recipe_file, monkeypatch, num_workers, is_stream):
    """The connection breaks before the signal of its death comes, which then comes while that is handled."""

    def reset(*args, **kwargs):
        raise ConnectionResetError(104, "Connection reset by peer")

    def signal_comes(seconds):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("vocabridge.run.DistillationTrainer.train", reset)
    monkeypatch.setattr("vocabridge.run.time", SimpleNamespace(sleep=signal_comes))
    expected = UserError if num_workers else ConnectionResetError
    advice = "workers must stay" if is_stream else r"fewer training\.dataloader_num_workers"
    with pytest.raises(expected, match=f"prepares batches has died.*{advice}" if num_workers else "reset by peer"):
        distill(
            load_recipe(
                recipe_file, [f"training.dataloader_num_workers={num_workers}", f"data.streaming={is_stream}".lower()]
            )
        )


def test_streams_start_over_and_resume_in_a_later_pass(recipe_file, tmp_path):
    """8 rows, 4 a batch, 3 batches a step: the passes end inside steps."""
    options = ["data.streaming=true", "training.gradient_accumulation_steps=3", "training.lr_scheduler_type=constant"]
    whole = f"training.output_dir={tmp_path}/whole"
    distill(load_recipe(recipe_file, [*options, "training.max_steps=4", whole]))
    distill(load_recipe(recipe_file, [*options, "training.max_steps=2"]))
    distill(load_recipe(recipe_file, [*options, "training.max_steps=4"]), resume=True)
    losses = logged_losses(tmp_path / "whole")
    assert logged_losses(tmp_path / "run") == losses
    assert max(losses.values()) < 1.3 * min(losses.values()), "a step counted twice"


def test_adapters_are_merged_into_the_run_folder(recipe_file, tmp_path):
    distill(load_recipe(recipe_file, ["student.lora.r=2", "student.lora.alpha=64", "training.learning_rate=1e-2"]))
    run_dir = tmp_path / "run"
    merged, base = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("run", "student"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])
    assert merged.config.use_cache
    adapter = AutoModelForCausalLM.from_pretrained(run_dir / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-4)


def test_streamed_data_gives_the_same_kind_of_run(recipe_file, tmp_path):
    result = distill(load_recipe(recipe_file, ["data.streaming=true"]))
    assert result.steps == 4
    assert len(logged_losses(tmp_path / "run")) == 4
    assert "probe/mmd_squared" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_supervised_fine_tuning_needs_no_teacher(recipe_file, tmp_path):
    values = yaml.safe_load(recipe_file.read_text())
    del values["teacher"]
    values["objective"] = {"name": "cross_entropy"}
    values["data"]["validation"] = "train.jsonl"
    values["training"] |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    recipe_file.write_text(yaml.safe_dump(values))
    distill(load_recipe(recipe_file))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [entry["step"] for entry in lines if "eval_loss" in entry] == [2, 4]
    assert not (tmp_path / "run" / "objective.safetensors").exists()


def test_two_processes_train_as_one_with_the_double_batch(recipe_file, tmp_path):
    options = ["training.save_strategy=no", "objective.gan.dropout=0.0", "training.max_steps=3"]
    alone = ["training.per_device_train_batch_size=8", f"training.output_dir={tmp_path}/alone"]
    distill(load_recipe(recipe_file, [*options, *alone]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29541"]
    together = [*options, "training.per_device_train_batch_size=4", "training.ddp_backend=gloo"]
    command = [*launcher, "-m", "vocabridge", "distill", str(recipe_file), *together]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = logged_losses(tmp_path / "alone"), logged_losses(tmp_path / "run")
    assert one.keys() == two.keys() == {1, 2, 3}
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-4), step
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("alone", "run"))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def wait_for(condition, *, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("timed out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_goes_on_to_the_same_result(recipe_file, tmp_path, number):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    options = ["training.max_steps=60", "training.save_steps=5"]
    command = [sys.executable, "-m", "vocabridge", "distill", str(recipe_file), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(run_dir.glob("checkpoint-*")) or process.poll() is not None)
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 0}[number], messages
        assert "--resume" in messages
        assert "Traceback" not in messages
    assert not (run_dir / "README.md").exists(), "the run was over before the signal"
    distill(load_recipe(recipe_file, options), resume=True)
    distill(load_recipe(recipe_file, [*options, f"training.output_dir={whole}"]))
    assert logged_losses(run_dir) == logged_losses(whole)
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run_dir, whole))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
