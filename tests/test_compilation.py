"""Compiled trunks: the same numbers, few graphs, plain names on disk; and what is refused before models are loaded."""

import shutil

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.compilation import compile_trunks
from vocabridge.errors import UserError
from vocabridge.models.forward import forward_side
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

GAN = {"name": "dskd_cma", "matching": "gan", "gan": {"dropout": 0.0, "hidden_size": 16}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make_trainer(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    def make(objective=GAN, *, folder="run", eval_rows=None, **arguments):
        defaults = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "diagnostics_steps": 0,
        }
        return DistillationTrainer(
            one_layer(student_model(tiny_bpe_tokenizer)),
            one_layer(teacher_model(tiny_sentencepiece_tokenizer)),
            objective=objective,
            args=DistillationConfig(output_dir=str(tmp_path / folder), **{**defaults, **arguments}),
            train_dataset=ROWS,
            eval_dataset=eval_rows,
            student_tokenizer=tiny_bpe_tokenizer,
            teacher_tokenizer=tiny_sentencepiece_tokenizer,
        )

    return make


def one_layer(model):
    """Half of the time to compile."""
    model.config.num_hidden_layers = 1
    del model.model.layers[1:]
    return model


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_compiled_run_is_the_eager_run_on_one_graph_a_trunk(make_trainer):
    """Losses and gradient norms of every step; the checkpoint that it leaves; and the run that goes on from there."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    eager = make_trainer(folder="eager", **saving)
    eager.train()
    compiled = make_trainer(folder="compiled", torch_compile=True, torch_compile_backend="aot_eager", **saving)
    lengths = seen_lengths(compiled)
    compiled.train()
    assert len(lengths) == 4
    assert counters["stats"]["unique_graphs"] == 2, "one of the student, one of the teacher"
    assert not counters["graph_break"]
    for name in ("loss", "grad_norm", "cross_entropy", "query_gradient_norm_kd"):
        assert logged(compiled, name) == pytest.approx(logged(eager, name), rel=1e-4), name
    folders = [trainer.args.output_dir + "/checkpoint-2" for trainer in (eager, compiled)]
    for file in ("model.safetensors", "objective.safetensors"):
        first, second = (load_file(f"{folder}/{file}") for folder in folders)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-6, msg=name)
    compiled.train(resume_from_checkpoint=folders[1])  # on the graphs that are there
    assert logged(compiled, "loss") == pytest.approx(logged(eager, "loss"), rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 2


def seen_lengths(trainer):
    """Shapes of the student's input ids, filled as the run goes on."""
    shapes = set()
    collate = trainer.data_collator

    def watched(pairs):
        batch = collate(pairs)
        if len(pairs) == 2:  # not the start-up check
            shapes.add(tuple(batch["input_ids"].shape))
        return batch

    trainer.data_collator = watched
    return shapes


def test_a_single_row_and_evaluation_have_a_graph_of_their_own(tiny_bpe_tokenizer):
    eager, model = student_model(tiny_bpe_tokenizer), student_model(tiny_bpe_tokenizer)
    compile_trunks([model, None], "eager", None)
    compile_trunks([model, None], "eager", None)  # once is enough
    expected = 0
    for num_rows, length, adds in ((4, 20, 1), (2, 31, 0), (3, 9, 0), (1, 20, 1), (1, 33, 0), (5, 64, 0)):
        batch = random_batch(num_rows, length)
        hidden, reference = (forward_side(each, *batch).hidden_states for each in (model, eager))
        torch.testing.assert_close(hidden, reference)
        expected += adds
        assert counters["stats"]["unique_graphs"] == expected, (num_rows, length)
    with torch.no_grad():
        for num_rows, length in ((4, 20), (2, 31)):
            forward_side(model.eval(), *random_batch(num_rows, length))
    assert counters["stats"]["unique_graphs"] == expected + 1


def random_batch(num_rows, length):
    """Ids, mask and labels, the first row padded."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 600, (num_rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, -3:], labels[0, -3:], labels[:, 0] = 0, -100, -100
    return ids, mask, labels


def test_activation_checkpointing_under_compilation(tiny_bpe_tokenizer):
    eager, model = student_model(tiny_bpe_tokenizer).train(), student_model(tiny_bpe_tokenizer).train()
    model.activation_checkpointing_enable()
    compile_trunks([model], "eager", None)
    batch = random_batch(3, 17)
    for each in (model, eager):
        forward_side(each, *batch).hidden_states[:, 0].sum().backward()
    for (name, parameter), other in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="backend inductor needs a C++ compiler on a CPU")
def test_inductor_gives_the_same_gradients(tiny_bpe_tokenizer):
    eager, model = (one_layer(student_model(tiny_bpe_tokenizer)) for _ in range(2))
    compile_trunks([model], "inductor", "default")
    for num_rows, length in ((3, 17), (2, 23)):
        batch = random_batch(num_rows, length)
        for each in (model, eager):
            each.zero_grad()
            hidden = forward_side(each, *batch).hidden_states
            # Not a sum of squares, which the last norm makes a constant: its gradient is rounding noise.
            (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        for (name, parameter), other in zip(eager.named_parameters(), model.parameters(), strict=True):
            error = (other.grad - parameter.grad).abs().max() / parameter.grad.abs().max()
            assert float(error) < 1e-5, name
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"torch_compile_backend": "inductr"}, "'inductr' is unknown; did you mean 'inductor'"),
        ({"torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"}, "no effect with backend 'eager'"),
        ({"torch_compile_mode": "fast"}, "torch_compile_mode: 'fast' is unknown. Known: default, "),
    ],
)
def test_wrong_settings(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, torch_compile=True, **arguments)


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs the C\\+\\+ compiler 'no-such-compiler' on a CPU"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, torch_compile=True)
    DistillationConfig(output_dir=str(tmp_path), use_cpu=True, torch_compile_backend="aot_eager")


def test_an_objective_that_reads_inner_layers_is_refused(make_trainer):
    with pytest.raises(UserError, match="reads inner layers, which a compiled model does not show"):
        make_trainer({"name": "hidden_state"}, torch_compile=True, torch_compile_backend="eager")


def test_compilation_by_accelerate_alone_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(
        DistillationTrainer,
        "_build_accelerator_args",
        with_plugin(DistillationTrainer._build_accelerator_args, TorchDynamoPlugin(backend="eager")),
    )
    with pytest.raises(UserError, match=r"set training\.torch_compile: true"):
        make_trainer()


def with_plugin(build, plugin):
    """As ``accelerate launch --dynamo_backend`` sets it."""
    return lambda trainer, **given: build(trainer, **given) | {"dynamo_plugin": plugin}
