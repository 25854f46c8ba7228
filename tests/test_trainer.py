import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.checkpoint_files import seal
from vocabridge.distillation_model import NonFiniteLoss
from vocabridge.errors import UserError
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig


@pytest.fixture
def make_trainer(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    def make(objective="dskd_cma", *, student=None, teacher=True, folder="run", rows=ROWS, eval_rows=None, **arguments):
        defaults = {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "diagnostics_steps": 2,
        }
        return DistillationTrainer(
            student or student_model(tiny_bpe_tokenizer),
            teacher_model(tiny_sentencepiece_tokenizer) if teacher else None,
            objective=objective,
            args=DistillationConfig(output_dir=str(tmp_path / folder), **{**defaults, **arguments}),
            train_dataset=rows,
            eval_dataset=eval_rows,
            student_tokenizer=tiny_bpe_tokenizer,
            teacher_tokenizer=tiny_sentencepiece_tokenizer if teacher else None,
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gradients_of_one_step(trainer):
    """Gradients just before the first optimizer step."""
    caught = {}

    def catch(*args, **kwargs):
        model = trainer.distillation_model
        caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.step = catch
    trainer.train()
    return caught


GAN = {"name": "dskd_cma", "matching": "gan", "gan": {"dropout": 0.0, "hidden_size": 16}}


@pytest.mark.parametrize("objective", ["cross_entropy", GAN], ids=["cross_entropy", "dskd_cma_gan"])
def test_gradient_does_not_depend_on_how_the_step_is_accumulated(make_trainer, objective):
    teacher = objective != "cross_entropy"
    whole = make_trainer(
        objective, teacher=teacher, max_steps=1, per_device_train_batch_size=8, max_grad_norm=0.0, diagnostics_steps=0
    )
    split = make_trainer(
        objective,
        teacher=teacher,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
        diagnostics_steps=0,
    )
    one, many = gradients_of_one_step(whole), gradients_of_one_step(split)
    assert one.keys() == many.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(many[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_every_trained_parameter_is_in_one_group_and_moves(make_trainer):
    trainer = make_trainer(
        GAN, max_steps=2, projector_learning_rate=2e-3, discriminator_learning_rate=3e-3, weight_decay=0.01
    )
    model = trainer.distillation_model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(id(p) for p in trained.values())
    unmoved = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert unmoved == []
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"student": 1e-3, "projectors": 2e-3, "discriminator": 3e-3}
    decays = {(g["name"], g["weight_decay"]) for g in trainer.optimizer.param_groups}
    assert ("discriminator", 0.0) in decays
    assert ("discriminator", 0.01) in decays
    teacher = trainer.teacher.model
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training


def test_log_has_every_term_and_diagnostic(make_trainer):
    trainer = make_trainer(GAN)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    step = next(entry for entry in history if "loss" in entry)
    for name in [
        "loss/student_space",
        "loss/teacher_space",
        "loss/gan_queries",
        "loss/gan_keys",
        "cross_entropy",
        "t2s_cross_entropy",
        "t2s_divergence",
        "s2t_divergence",
        "t2s_accuracy",
        "s2t_accuracy",
        "student_accuracy",
        "discriminator_query_accuracy",
        "discriminator_key_accuracy",
        "coverage",
        "attention_in_chunk",
        "query_gradient_norm_kd",
        "query_gradient_norm_matching",
        "query_gradient_ratio",
    ]:
        assert name in step, name
    assert step["coverage"] == 1.0
    parts = (
        0.5 * step["cross_entropy"]
        + 0.5 * (step["t2s_cross_entropy"] + step["t2s_divergence"] + step["s2t_divergence"])
        + step["loss/gan_queries"]
        + step["loss/gan_keys"]
    )
    assert step["loss"] == pytest.approx(parts, rel=1e-4)
    probes = [entry for entry in history if "probe/mmd_squared" in entry]
    assert [entry["step"] for entry in probes] == [0, 2, 4]
    for name in ["sliced_wasserstein", "energy_distance", "mean_cosine", "two_sample_accuracy"]:
        assert f"probe/{name}" in probes[0], probes[0].keys()
    lines = (trainer.args.output_dir + "/metrics.jsonl", history)
    with open(lines[0]) as stream:
        assert [json.loads(line) for line in stream] == history


def test_every_seed_is_probed_on_the_same_rows(make_trainer):
    trainers = [make_trainer(seed=seed, folder=str(seed), diagnostics_examples=3) for seed in (1, 2)]
    ids = [trainer._probe()["input_ids"] for trainer in trainers]
    assert torch.equal(*ids)
    assert len(ids[0]) == 3


def test_loss_falls(make_trainer):
    trainer = make_trainer(GAN, max_steps=30, learning_rate=5e-3)
    trainer.train()
    values = losses(trainer)
    assert sum(values[-3:]) < 0.7 * sum(values[:3]), values


def test_a_run_stopped_at_half_and_resumed_gives_the_same_losses(make_trainer):
    whole = make_trainer(GAN, max_steps=6, folder="whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer(GAN, max_steps=6, folder="resumed", save_strategy="steps", save_steps=3)
    resumed.objective_module.query_projector.weight.data.normal_()  # whatever it starts from, the checkpoint must win
    resumed.train(resume_from_checkpoint=str(whole.args.output_dir) + "/checkpoint-3")
    assert losses(resumed)[3:] == losses(whole)[3:]
    for name, parameter in whole.distillation_model.named_parameters():
        assert torch.equal(parameter, dict(resumed.distillation_model.named_parameters())[name]), name


def test_run_folder_is_a_checkpoint_of_the_student(make_trainer):
    trainer = make_trainer(GAN)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, trainer.student.eval()(ids).logits)
    assert loaded.config.use_cache
    assert len(AutoTokenizer.from_pretrained(trainer.args.output_dir)) == len(trainer.processing_class)


def test_sums_for_the_log_of_another_number_of_processes_are_left_out(make_trainer):
    """The checkpoint lies between two lines of the log; each process scales its share by their number."""
    options = {"max_steps": 4, "lr_scheduler_type": "constant"}
    by_step = make_trainer(GAN, folder="by_step", **options)
    by_step.train()
    whole = make_trainer(GAN, logging_steps=2, save_strategy="steps", save_steps=3, **options)
    whole.train()
    checkpoint = Path(whole.args.output_dir, "checkpoint-3")
    window = json.loads((checkpoint / "log_window.json").read_text())
    assert window["world_size"] == 1
    (checkpoint / "log_window.json").write_text(json.dumps(window | {"world_size": 2}))
    seal(checkpoint)
    resumed = make_trainer(GAN, folder="resumed", logging_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    last = [trainer.state.log_history[-2] for trainer in (resumed, by_step)]
    assert [entry["step"] for entry in last] == [4, 4]
    for name in ("loss", "cross_entropy"):
        assert last[0][name] == pytest.approx(last[1][name], rel=1e-6)
    assert losses(whole)[-1] != pytest.approx(losses(by_step)[-1], rel=1e-3), "the two steps of a line are alike"


def test_a_checkpoint_of_weights_alone_is_not_trained_from(make_trainer):
    trainer = make_trainer(GAN, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer.train()
    again = make_trainer(GAN, max_steps=6, folder="again")
    with pytest.raises(UserError, match=r"checkpoint-4 lacks optimizer\.pt"):
        again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-4")


def test_resuming_from_python_finds_and_checks_checkpoints_as_the_command_does(make_trainer):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(GAN, **options)
    with pytest.raises(UserError, match="has no checkpoint to resume from"):
        whole.train(resume_from_checkpoint=True)
    whole.train()
    folder = Path(whole.args.output_dir)
    with pytest.raises(UserError, match="steps of 4 rows, and now a step would hold 2"):
        make_trainer(GAN, **options, per_device_train_batch_size=2).train(resume_from_checkpoint=True)
    with (folder / "checkpoint-4" / "objective.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(UserError, match="checkpoint-4"):
        make_trainer(GAN, **options).train(resume_from_checkpoint=folder / "checkpoint-4")
    for given in (True, folder / "checkpoint-2"):
        again = make_trainer(GAN, **options)
        again.train(resume_from_checkpoint=given)
        assert losses(again) == losses(whole)
        shutil.rmtree(folder / "checkpoint-4")


def test_failed_saving_leaves_earlier_checkpoints_whole(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(GAN, max_steps=4, save_strategy="steps", save_steps=2)
    write = torch.save

    def full_disk(value, path, *args, **kwargs):
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        write(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        trainer.train()
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["checkpoint-2"]
    monkeypatch.undo()
    again = make_trainer(GAN, max_steps=4, folder="other")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4


def test_nan_stops_and_names_the_term(make_trainer):
    trainer = make_trainer(GAN)
    with torch.no_grad():
        trainer.objective_module.student_to_teacher.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"teacher_space.*s2t_divergence"):
        trainer.train()


def test_signal_saves_a_checkpoint_and_stops(make_trainer, tmp_path):
    trainer = make_trainer(GAN, max_steps=10)
    stop_after = 3

    def interrupt(*args, **kwargs):
        if trainer.state.global_step == stop_after - 1:
            trainer.interrupt._handle(2, None)
        return original(*args, **kwargs)

    original, trainer.compute_loss = trainer.compute_loss, interrupt
    trainer.train()
    assert trainer.interrupt.interrupted
    assert trainer.state.global_step == stop_after
    assert (tmp_path / "run" / f"checkpoint-{stop_after}" / "objective.safetensors").is_file()


def test_evaluation_averages_over_tokens_not_batches(make_trainer, tiny_bpe_tokenizer):
    trainer = make_trainer("cross_entropy", teacher=False)
    pairs = trainer.train_dataset
    one = trainer.evaluate(eval_dataset=pairs)["eval_loss"]
    trainer.args.per_device_eval_batch_size = 3
    assert trainer.evaluate(eval_dataset=pairs)["eval_loss"] == pytest.approx(one, rel=1e-5)
    total, count = 0.0, 0
    for pair in pairs:
        ids = torch.tensor([pair.student.input_ids])
        labels = torch.tensor([pair.student.labels])
        result = trainer.student.eval()(ids, labels=labels)
        total += float(result.loss.detach()) * len(pair.student.spans)
        count += len(pair.student.spans)
    assert one == pytest.approx(total / count, rel=1e-4)


def test_eval_loss_leaves_the_matching_term_out(make_trainer):
    adversarial, plain = make_trainer(GAN), make_trainer({**GAN, "matching": "none", "gan": {}}, folder="plain")
    plain.objective_module.load_state_dict(adversarial.objective_module.state_dict(), strict=False)
    scores = [trainer.evaluate(eval_dataset=ROWS) for trainer in (adversarial, plain)]
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=1e-5)
    assert scores[0]["eval_loss/gan_queries"] > 0


def test_the_best_checkpoint_may_be_that_of_any_metric(make_trainer):
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "eval_rows": ROWS}
    trainer = make_trainer(GAN, metric_for_best_model="student_accuracy", learning_rate=1e-2, **options)
    trainer.train()
    scores = [entry["eval_student_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(scores) == 3
    assert trainer.state.best_metric == max(scores) > 0


def test_an_interrupt_keeps_its_checkpoint_beside_the_best_one(make_trainer, tmp_path):
    trainer = make_trainer(
        GAN,
        max_steps=10,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        eval_rows=ROWS,
    )
    trainer.state.best_metric = 0.0

    def interrupt(*args, **kwargs):
        if trainer.state.global_step == 4:
            trainer.state.best_global_step, trainer.state.best_metric = 2, -1.0
            trainer.interrupt._handle(2, None)
        return original(*args, **kwargs)

    original, trainer.compute_loss = trainer.compute_loss, interrupt
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-5").is_dir()


def test_options_without_effect_are_refused(make_trainer):
    for option in ({"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}, {"bf16_full_eval": True}):
        with pytest.raises(UserError, match="cannot be used with distillation losses"):
            make_trainer(GAN, **option)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ({"hub_token": "hf_secret"}, "hf auth login"),
        ({"hub_strategy": "all_checkpoints"}, "push_to_hub"),
        ({"hub_always_push": True}, "push_to_hub"),
        ({"enable_jit_checkpoint": True}, "SIGTERM saves"),
        ({"auto_find_batch_size": True}, "vocabridge plan"),
        ({"save_on_each_node": True}, "the first process writes"),
        ({"average_tokens_across_devices": False}, "all processes"),
    ],
)
def test_options_that_break_a_promise_are_refused(tmp_path, option, instead):
    with pytest.raises(UserError) as caught:
        DistillationConfig(str(tmp_path), use_cpu=True, report_to="none", **option)
    (name,) = option
    assert f"training.{name} cannot be used" in str(caught.value)
    assert instead in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_a_parallelism_of_accelerates_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"parallelism_config .*is not supported"):
        DistillationConfig(str(tmp_path), use_cpu=True, report_to="none", parallelism_config=ParallelismConfig())


def test_the_discriminators_gradient_does_not_shrink_the_students(make_trainer):
    trainer = make_trainer({**GAN, "matching_weight": 0.0}, max_steps=1, max_grad_norm=1e-2, diagnostics_steps=0)
    trainer.create_optimizer()
    caught = {}

    def catch(*args, **kwargs):
        for group in trainer.optimizer.param_groups:
            squares = [float(p.grad.square().sum()) for p in group["params"] if p.grad is not None]
            caught[group["name"]] = caught.get(group["name"], 0.0) + sum(squares)

    trainer.optimizer.step = catch
    trainer.train()
    assert caught["student"] + caught["projectors"] == pytest.approx(1e-4, rel=1e-3)
    assert 0 < caught["discriminator"] <= 1.001e-4


def test_same_seed_same_numbers(make_trainer):
    first, second, other = (make_trainer(GAN, seed=seed, folder=f"{n}") for n, seed in enumerate((1, 1, 2)))
    for trainer in (first, second, other):
        trainer.train()
    assert losses(first) == losses(second)
    assert losses(first) != losses(other)


def test_bad_set_ups_are_refused(make_trainer):
    with pytest.raises(UserError, match="needs a teacher"):
        make_trainer("dskd_cma", teacher=False)
    with pytest.raises(UserError, match="did you mean 'dskd_cma'"):
        make_trainer("dskd_cmma")
    trainer = make_trainer("cross_entropy", teacher=False)
    trainer.get_optimizer_cls_and_kwargs = lambda args, model: (torch.optim.SGD, {"optimizer_dict": {}})
    with pytest.raises(UserError, match="builds its own parameter groups"):
        trainer.train()


def test_low_rank_student_trains_adapters_only(make_trainer, tiny_bpe_tokenizer):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(
        student_model(tiny_bpe_tokenizer), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trainer = make_trainer(GAN, student=student, save_strategy="steps", save_steps=2)
    frozen = {n: p.detach().clone() for n, p in student.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)
    values = losses(trainer)
    again = get_peft_model(
        student_model(tiny_bpe_tokenizer), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    resumed = make_trainer(GAN, student=again, folder="resumed")
    resumed.train(resume_from_checkpoint=trainer.args.output_dir + "/checkpoint-2")
    assert losses(resumed)[2:] == values[2:]


def test_dropped_and_cut_rows_are_told(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer("cross_entropy", teacher=False, rows=[*ROWS, {"prompt": "x\n", "response": " "}], max_length=24)
    assert "dropped" in caplog.text
    assert "truncated" in caplog.text


def test_bfloat16_autocast_and_gradient_checkpointing(make_trainer):
    """The paths that GPUs take, on the CPU: the numbers stay near float32, and recomputation changes nothing."""
    exact, low = make_trainer(GAN, folder="exact"), make_trainer(GAN, folder="low", bf16=True)
    recomputed = make_trainer(GAN, folder="recomputed", activation_checkpointing=True)
    for trainer in (exact, low, recomputed):
        trainer.train()
    assert losses(recomputed) == pytest.approx(losses(exact), rel=1e-5)
    assert losses(low) == pytest.approx(losses(exact), rel=2e-2)
    assert losses(low) != losses(exact)
    assert {p.dtype for p in low.distillation_model.parameters()} == {torch.float32}
