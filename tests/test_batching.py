import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_pair import ROWS, student_model, teacher_model
from vocabridge.batching import BatchLimits, LengthGroupedBatches, pair_lengths
from vocabridge.errors import UserError
from vocabridge.pairs import PairCollator, PairTokenizer, StreamingPairs, tokenize_examples
from vocabridge.recipe import recipe_from_values
from vocabridge.text import Example
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

LONG = {"prompt": ROWS[3]["prompt"], "response": " ".join([ROWS[3]["response"]] * 4)}
UNEQUAL = [*ROWS[:7], LONG]
"""With a budget of the longest row's tokens: that row alone, and the others by threes and fours."""

GAN = {"name": "dskd_cma", "matching": "gan", "gan": {"dropout": 0.0, "hidden_size": 16}}


def random_lengths(*, rows=500, seed=0):
    """Tokens of both sides, as unequal as real data's: most rows short, some near the limit."""
    generator = np.random.default_rng(seed)
    student = np.exp(generator.normal(4.5, 0.8, rows)).clip(5, 512)
    return np.stack([student, (student * generator.uniform(0.95, 1.05, rows)).clip(5, 512)], axis=1).astype(int)


def padded_tokens(lengths, batch, multiple=1):
    """By loops: what the collator would make of the batch."""
    total = 0
    for side in range(lengths.shape[1]):
        longest = max(int(lengths[row, side]) for row in batch)
        total += len(batch) * math.ceil(longest / multiple) * multiple
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=80),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 400),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_every_row_is_in_one_batch_of_each_epoch_within_the_limits(rows, num_ranks, multiple, spare, max_rows):
    lengths = np.array(rows)
    longest = max(padded_tokens(lengths, [row], multiple) for row in range(len(rows)))
    limits = BatchLimits(max_rows=max_rows, max_tokens=longest + spare, pad_to_multiple_of=multiple)
    batches = LengthGroupedBatches(lengths, limits=limits, num_ranks=num_ranks, seed=3)
    for epoch in range(3):
        batches.set_epoch(epoch)
        given_out = list(batches)
        assert len(given_out) == len(batches)
        assert len(batches) % num_ranks == 0
        assert all(batch and padded_tokens(lengths, batch, multiple) <= longest + spare for batch in given_out)
        assert max_rows is None or max(map(len, given_out)) <= max_rows
        seen = sorted(row for batch in given_out for row in batch)
        if max(map(len, given_out)) > 1 or num_ranks == 1:
            assert seen == list(range(len(rows)))
        else:  # nothing is left to split: a few rows come twice, none is left out
            assert sorted(set(seen)) == list(range(len(rows)))
            assert len(seen) - len(rows) < num_ranks


def test_batches_depend_on_seed_and_epoch_alone():
    def batches(seed, epoch):
        sampler = LengthGroupedBatches(random_lengths(), limits=BatchLimits(max_tokens=4096), seed=seed)
        sampler.set_epoch(epoch)
        return [sorted(batch) for batch in sampler]

    assert batches(1, 2) == batches(1, 2)
    in_common = [batch for batch in batches(1, 2) if batch in batches(1, 3)]
    assert len(in_common) < len(batches(1, 2)) / 4, "rows should meet other rows in another epoch"
    assert batches(1, 2) != batches(2, 2)


def test_the_largest_batch_comes_first_and_the_rest_is_mixed():
    lengths = random_lengths()
    for num_ranks in (1, 2):
        sampler = LengthGroupedBatches(lengths, limits=BatchLimits(max_rows=8), num_ranks=num_ranks)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            sizes = [padded_tokens(lengths, batch) for batch in sampler]
            assert max(sizes[:num_ranks]) == max(sizes)
            assert sizes != sorted(sizes, reverse=True)
            halves = np.array_split(np.array(sizes), 2)
            assert 0.5 < halves[0].sum() / halves[1].sum() < 2


def test_little_is_padded_and_ranks_get_equal_work():
    lengths = random_lengths(rows=3000)
    shuffled = np.random.default_rng(0).permutation(3000).reshape(-1, 8)
    assert sum(padded_tokens(lengths, batch) for batch in shuffled) > 1.7 * lengths.sum()
    for limits in (BatchLimits(max_tokens=4096), BatchLimits(max_rows=8)):
        sampler = LengthGroupedBatches(lengths, limits=limits, num_ranks=2)
        sizes = np.array([padded_tokens(lengths, batch) for batch in sampler])
        assert sizes.sum() < 1.1 * lengths.sum()
        together = sizes.reshape(-1, 2)
        assert together.max(axis=1).sum() < 1.06 * together.mean(axis=1).sum()


def test_without_shuffling_the_longest_batch_is_first_every_time():
    lengths = random_lengths()
    sampler = LengthGroupedBatches(lengths, limits=BatchLimits(max_rows=8), shuffle=False)
    widths = [int(lengths[batch].sum(axis=1).max()) for batch in sampler]
    assert widths == sorted(widths, reverse=True)
    first = list(sampler)
    sampler.set_epoch(5)
    assert list(sampler) == first


@pytest.fixture
def make_trainer(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    def make(objective=GAN, *, folder="run", rows=UNEQUAL, teacher=True, **arguments):
        defaults = {
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "diagnostics_steps": 0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
        }
        trainer = DistillationTrainer(
            student_model(tiny_bpe_tokenizer),
            teacher_model(tiny_sentencepiece_tokenizer) if teacher else None,
            objective=objective,
            args=DistillationConfig(output_dir=str(tmp_path / folder), **{**defaults, **arguments}),
            train_dataset=rows,
            student_tokenizer=tiny_bpe_tokenizer,
            teacher_tokenizer=tiny_sentencepiece_tokenizer if teacher else None,
        )
        compute_loss, trainer.seen = trainer.compute_loss, []

        def record(model, inputs, *args, **kwargs):
            trainer.seen.append({name: tensor.clone() for name, tensor in inputs.items()})
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = record
        return trainer

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gradients_of_one_step(trainer):
    caught = {}

    def catch(*args, **kwargs):
        caught.update({n: p.grad.clone() for n, p in trainer.distillation_model.named_parameters()})

    trainer.create_optimizer()
    trainer.optimizer.step = catch
    trainer.train()
    return caught


def budget_for(trainer):
    return int(pair_lengths(trainer.train_dataset).sum(axis=1).max())


@pytest.mark.parametrize("objective", ["cross_entropy", GAN], ids=["cross_entropy", "dskd_cma_gan"])
def test_gradient_of_a_step_is_that_of_one_plain_batch_of_the_same_rows(make_trainer, objective):
    teacher = objective != "cross_entropy"
    plain = make_trainer(objective, teacher=teacher, max_steps=1, per_device_train_batch_size=len(UNEQUAL))
    budget = budget_for(plain)
    grouped = make_trainer(
        objective, teacher=teacher, max_steps=1, gradient_accumulation_steps=8, max_tokens_per_batch=budget
    )
    whole, parts = gradients_of_one_step(plain), gradients_of_one_step(grouped)
    sizes = [len(batch["input_ids"]) for batch in grouped.seen]
    assert len(plain.seen) == 1
    assert 2 <= len(sizes) < 8
    assert len(set(sizes)) > 1, "the batches should differ in size"
    assert sum(sizes) == len(UNEQUAL)
    for batch in grouped.seen:
        sides = [batch[name] for name in ("input_ids", "teacher_input_ids") if name in batch]
        assert sum(side.numel() for side in sides) <= budget
    for name, gradient in whole.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_trunks_see_no_padding_beyond_the_longest_row(make_trainer):
    trainer = make_trainer(train_sampling_strategy="group_by_length", per_device_train_batch_size=3, num_train_epochs=1)
    widths = {"student": [], "teacher": []}
    for name, model in (("student", trainer.student), ("teacher", trainer.teacher.model)):
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: widths[name].append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
    trainer._checked = True  # the start-up check runs the models too
    trainer.train()
    for name, prefix in (("student", ""), ("teacher", "teacher_")):
        longest = [int(batch[f"{prefix}attention_mask"].sum(dim=1).max()) for batch in trainer.seen]
        rows = [len(batch["input_ids"]) for batch in trainer.seen]
        assert widths[name] == list(zip(rows, longest, strict=True))
    assert sorted(rows) == [2, 3, 3]


@pytest.mark.parametrize(
    "options",
    [{"max_tokens_per_batch": "two rows"}, {"train_sampling_strategy": "group_by_length"}],
    ids=["budget", "group_by_length"],
)
def test_a_run_resumed_inside_an_epoch_sees_the_same_batches(make_trainer, options):
    if "max_tokens_per_batch" in options:
        options = {"max_tokens_per_batch": budget_for(make_trainer()), "gradient_accumulation_steps": 2}
    else:
        options = {**options, "per_device_train_batch_size": 2}
    options |= {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(folder="whole", **options)
    whole.train()
    per_epoch = whole.state.max_steps // 3
    assert whole.state.global_step == whole.state.max_steps == 3 * per_epoch
    assert 3 % per_epoch, "the checkpoint should lie inside an epoch"
    resumed = make_trainer(folder="resumed", **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert len(resumed.seen) > 2
    for batch, same in zip(resumed.seen, whole.seen[-len(resumed.seen) :], strict=True):
        assert torch.equal(batch["input_ids"], same["input_ids"])


def test_each_epoch_has_every_row_once_and_the_log_counts_rows(make_trainer):
    trainer = make_trainer()
    trainer = make_trainer(max_tokens_per_batch=budget_for(trainer), num_train_epochs=2)
    rows = [tuple(pair.student.input_ids) for pair in trainer.train_dataset]
    trainer.train()
    half = len(trainer.seen) // 2
    for epoch in (trainer.seen[:half], trainer.seen[half:]):
        ids = [
            tuple(row[mask.bool()].tolist())
            for batch in epoch
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert sorted(ids) == sorted(rows)
    assert trainer.get_total_train_batch_size(trainer.args) == round(len(UNEQUAL) / half)


def test_evaluation_batches_are_sorted_and_bounded(make_trainer):
    plain = make_trainer(per_device_eval_batch_size=8)
    budget = budget_for(plain)
    bounded = make_trainer(per_device_eval_batch_size=3, max_tokens_per_batch=budget)
    batches = list(bounded.get_eval_dataloader(bounded.train_dataset))
    assert sum(len(batch["input_ids"]) for batch in batches) == len(UNEQUAL)
    assert max(len(batch["input_ids"]) for batch in batches) == 3
    assert all(batch["input_ids"].numel() + batch["teacher_input_ids"].numel() <= budget for batch in batches)
    widths = [batch["input_ids"].shape[1] + batch["teacher_input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    scores = [trainer.evaluate(trainer.train_dataset)["eval_loss"] for trainer in (plain, bounded)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_budget_that_a_row_alone_exceeds_is_refused(make_trainer):
    with pytest.raises(UserError, match="one row alone has"):
        make_trainer(max_tokens_per_batch=20)


def test_what_cannot_be_grouped_is_refused(make_trainer, tiny_bpe_tokenizer):
    examples = [Example("a", (), "b", ("b",), "x")]
    stream = StreamingPairs(examples, PairTokenizer(tiny_bpe_tokenizer))
    for options in ({"max_tokens_per_batch": 500}, {"train_sampling_strategy": "group_by_length"}):
        with pytest.raises(UserError, match="a stream does not tell"):
            make_trainer("cross_entropy", teacher=False, rows=stream, max_steps=1, **options)
        with pytest.raises(UserError, match="dataloader_drop_last"):
            make_trainer(dataloader_drop_last=True, **options)
        with pytest.raises(UserError, match="dispatch_batches"):
            make_trainer(accelerator_config={"dispatch_batches": True}, **options)
    with pytest.raises(UserError, match="the budget takes its place"):
        make_trainer(max_tokens_per_batch=500, per_device_train_batch_size=4)
    with pytest.raises(UserError, match="batch_rebalance"):
        make_trainer(train_sampling_strategy="batch_rebalance")


@pytest.mark.parametrize(
    ("training", "data", "message"),
    [
        ({"max_tokens_per_batch": 4096, "per_device_train_batch_size": 8}, {}, "takes the place of"),
        ({"max_tokens_per_batch": 4096, "max_steps": 1}, {"streaming": True}, "max_tokens_per_batch needs the length"),
        (
            {"train_sampling_strategy": "group_by_length", "max_steps": 1},
            {"streaming": True},
            "train_sampling_strategy needs the length",
        ),
        ({"max_tokens_per_batch": 0}, {}, "max_tokens_per_batch"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(training, data, message):
    with pytest.raises(UserError, match=message):
        recipe_from_values(
            {
                "data": {"train": "hub/data", **data},
                "student": {"model": "hub/student"},
                "objective": {"name": "cross_entropy"},
                "training": {"output_dir": "runs/x", **training},
            }
        )


TWO_RANKS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import PreTrainedTokenizerFast
from tiny_pair import student_model, teacher_model
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

ROWS = json.load(open(sys.argv[2] + "/rows.json"))

def run(folder, *, resume=None, **options):
    student, teacher = (PreTrainedTokenizerFast.from_pretrained(sys.argv[2] + "/" + side) for side in "st")
    trainer = DistillationTrainer(
        student_model(student), teacher_model(teacher), objective=json.loads(sys.argv[3]),
        args=DistillationConfig(
            output_dir=sys.argv[2] + "/" + folder, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True,
            disable_tqdm=True, diagnostics_steps=0, lr_scheduler_type="constant", max_grad_norm=0.0,
            ddp_backend="gloo", max_tokens_per_batch=int(sys.argv[4]), **options),
        train_dataset=ROWS, student_tokenizer=student, teacher_tokenizer=teacher)
    rows = [tuple(pair.student.input_ids) for pair in trainer.train_dataset]
    seen, compute_loss = [], trainer.compute_loss
    def record(model, inputs, *args, **kwargs):
        masks = inputs["attention_mask"].bool()
        seen.append([rows.index(tuple(ids[mask].tolist())) for ids, mask in zip(inputs["input_ids"], masks)])
        return compute_loss(model, inputs, *args, **kwargs)
    trainer.compute_loss = record
    trainer.train(resume_from_checkpoint=resume and sys.argv[2] + "/" + resume)
    score = trainer.evaluate(ROWS)["eval_loss"]
    return {"seen": seen, "loss": [e["loss"] for e in trainer.state.log_history if "loss" in e], "eval_loss": score}

whole = run("whole", max_steps=5, save_strategy="steps", save_steps=3)
resumed = run("resumed", max_steps=5, save_strategy="no", resume="whole/checkpoint-3")
one_step = run("one_step", max_steps=2, save_strategy="no", gradient_accumulation_steps=4)
rank = torch.distributed.get_rank()
with open(f"{sys.argv[2]}/rank{rank}.json", "w") as stream:
    json.dump({"whole": whole, "resumed": resumed, "one_step": one_step}, stream)
"""


def test_two_ranks_share_the_batches_and_resume_inside_an_epoch(
    make_trainer, tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer
):
    (tmp_path / "rows.json").write_text(json.dumps(UNEQUAL))
    tiny_bpe_tokenizer.save_pretrained(tmp_path / "s")  # trained anew, tokenizers may differ from process to process
    tiny_sentencepiece_tokenizer.save_pretrained(tmp_path / "t")
    budget = budget_for(make_trainer())
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29547"]
    done = subprocess.run(
        [*launcher, str(script), str(Path(__file__).parent), str(tmp_path), json.dumps(GAN), str(budget)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    steps = [sorted(row for rank in ranks for row in rank["whole"]["seen"][step]) for step in range(5)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(8))
    for rank in ranks:
        assert rank["resumed"]["seen"] == rank["whole"]["seen"][3:]
        assert rank["resumed"]["loss"][3:] == rank["whole"]["loss"][3:]
        assert sorted(row for other in ranks for batch in other["one_step"]["seen"][:2] for row in batch) == [*range(8)]
    plain = make_trainer(per_device_train_batch_size=8, max_steps=2)
    plain.train()
    assert ranks[0]["one_step"]["loss"] == pytest.approx(losses(plain), rel=1e-4)
    assert ranks[0]["one_step"]["eval_loss"] == pytest.approx(plain.evaluate(UNEQUAL)["eval_loss"], rel=1e-4)


def test_lengths_are_those_of_the_ids(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    tokenize = PairTokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    pairs = tokenize_examples([Example(r["prompt"], (), r["response"], (r["response"],), "x") for r in ROWS], tokenize)
    batch = PairCollator(0, 0)(pairs[:])
    expected = [batch["attention_mask"].sum(dim=1).tolist(), batch["teacher_attention_mask"].sum(dim=1).tolist()]
    assert pair_lengths(pairs).T.tolist() == expected
