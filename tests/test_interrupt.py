"""Signals at every moment of a training: during a step, after an epoch's last one, after the last one of all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from vocabridge.interrupt import InterruptCallback
from vocabridge.preemption import Preempted, sigterm_raises

ARGS: Any = SimpleNamespace(world_size=1, device="cpu")
STATE = TrainerState(epoch=0.5)
EPOCH_END = TrainerState(epoch=2.0)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A shell without job control starts its background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def callback() -> Iterator[InterruptCallback]:
    made = InterruptCallback()
    made.on_train_begin(ARGS, STATE, TrainerControl())
    yield made
    made.restore()


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.001)  # the handler runs between two instructions


@pytest.mark.parametrize(("number", "preempted"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_the_step_is_finished_and_saved(callback: InterruptCallback, number: int, preempted: bool) -> None:
    control = TrainerControl()
    callback.on_step_end(ARGS, STATE, control)
    assert not control.should_save
    assert not callback.interrupted
    send(number)
    callback.on_step_end(ARGS, STATE, control)
    assert (control.should_save, control.should_training_stop) == (True, True)
    assert (callback.interrupted, callback.preempted) == (True, preempted)
    # The trainer says that an epoch ends, though it was broken off; the checkpoint is written already.
    control.should_log = control.should_evaluate = True
    callback.on_epoch_end(ARGS, STATE, control)
    assert (control.should_log, control.should_save, control.should_evaluate) == (False, False, False)
    callback.on_train_end(ARGS, STATE, control)
    callback.raise_late()


def test_a_signal_after_the_last_step_of_an_epoch_loses_no_checkpoint(callback: InterruptCallback) -> None:
    control = TrainerControl()
    callback.on_step_end(ARGS, EPOCH_END, control)
    send(signal.SIGTERM)  # while the step is evaluated, say
    control.should_save = True  # save_strategy: epoch
    callback.on_epoch_end(ARGS, EPOCH_END, control)
    assert (control.should_save, control.should_training_stop, callback.interrupted) == (True, True, True)


@pytest.mark.parametrize("last", ["of the epoch", "of training"])
def test_a_signal_in_the_last_step_waits_for_the_evaluation(callback: InterruptCallback, last: str) -> None:
    state, control = (EPOCH_END, TrainerControl()) if last == "of the epoch" else (STATE, TrainerControl(True))
    stops = control.should_training_stop
    send(signal.SIGTERM)
    callback.on_step_end(ARGS, state, control)
    assert (control.should_save, control.should_training_stop, callback.interrupted) == (False, stops, False)
    control.should_log = control.should_evaluate = True
    callback.on_epoch_end(ARGS, state, control)
    assert (control.should_log, control.should_evaluate, control.should_save) == (True, True, True)
    assert (control.should_training_stop, callback.interrupted, callback.preempted) == (True, True, True)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_a_signal_when_nothing_is_left_to_stop_is_not_forgotten(
    callback: InterruptCallback, number: int, raised: type[BaseException]
) -> None:
    """Training is whole, so its end is saved as ever; what comes after it is what the signal stops."""
    callback.on_epoch_end(ARGS, STATE, TrainerControl())
    send(number)
    callback.on_train_end(ARGS, STATE, TrainerControl())
    assert not callback.interrupted
    with pytest.raises(KeyboardInterrupt) as caught:
        callback.raise_late()
    assert type(caught.value) is raised


def test_ctrl_c_twice_stops_at_once_and_sigterm_twice_does_not(callback: InterruptCallback) -> None:
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_is_an_exception_once_and_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    saved = []

    def work() -> None:
        with sigterm_raises():
            try:
                send(signal.SIGTERM)
            finally:
                send(signal.SIGTERM)  # of the launcher, while the rest is being saved
                saved.append("rest")

    with pytest.raises(Preempted):
        work()
    assert saved == ["rest"]
    assert signal.getsignal(signal.SIGTERM) is before
