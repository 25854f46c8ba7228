"""Two ranks hold the same learned parts, and checkpoints fit any number of processes."""

from __future__ import annotations

import pytest

import data_parallel_cases as cases


def test_learned_parts_stay_the_same_to_the_last_bit(two_processes):
    first, second = two_processes["learned_parts"]
    names = {"student": 0, "projector": 0, "discriminator": 0}
    for name, bits in first["after"].items():
        assert bits == second["after"][name], name
        assert bits != first["before"][name], f"{name} was not trained"
        for kind in names:
            names[kind] += kind in name
    assert all(names.values()), f"something is missing: {names}"
    learned = [name for name in first["before"] if name.startswith("objective.")]
    assert any(first["before"][name] != second["before"][name] for name in learned), "the ranks did not start apart"


def assert_close(found, expected):
    found = {int(step): loss for step, loss in found.items()}
    assert found.keys() == expected.keys() == {1, 2, 3, 4}
    assert len(set(expected.values())) == 4, "nothing was trained"
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-4), step


def test_two_processes_go_on_from_the_checkpoint_of_one(two_processes):
    for rank in two_processes["checkpoints"]:
        assert_close(rank["resumed"], two_processes.losses_of_one)
        assert_close(rank["whole"], two_processes.losses_of_one)


def test_one_process_goes_on_from_the_checkpoint_of_two(two_processes, tmp_path):
    trainer = cases.trainer(tmp_path, cases.GAN, num_processes=1, max_steps=4)
    trainer.train(resume_from_checkpoint=str(two_processes.folder / "two" / "checkpoint-2"))
    assert_close(cases.losses(trainer.state.log_history), two_processes.losses_of_one)
