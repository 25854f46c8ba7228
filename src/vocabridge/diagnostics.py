"""When the distances between queries and keys are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class DiagnosticsCallback(TrainerCallback):
    """Logs a measurement at step 0, every ``diagnostics_steps`` and at the end."""

    def __init__(self, measure: Callable[[], dict[str, float]], log: Callable[[dict[str, float]], None]):
        self._measure_now = measure
        self._log = log
        self._last = -1

    def _measure(self, step: int) -> None:
        if self._last != step:
            self._last = step
            if report := self._measure_now():
                self._log(report)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, unless the run resumes."""
        if state.global_step == 0:
            self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every ``diagnostics_steps``."""
        if state.global_step % args.diagnostics_steps == 0:
            log_wanted = control.should_log
            self._measure(state.global_step)
            control.should_log = log_wanted  # logging takes the wish back, and the step's own losses are still due

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step."""
        self._measure(state.global_step)
