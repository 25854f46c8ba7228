"""A batch of fixed size that the processes of a launch cannot share out evenly."""

from __future__ import annotations

import subprocess
import sys

from bad_inputs.conftest import Workplaces
from bad_inputs.workplace import change_yaml, contents

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "vocabridge")


def test_processes_that_do_not_divide_a_fixed_batch(workplaces: Workplaces) -> None:
    folder = workplaces.fresh()
    change_yaml(
        folder / "recipe.yaml",
        training__per_device_train_batch_size=3,
        training__accelerator_config={"split_batches": True},
    )
    before = contents(folder)
    ended = subprocess.run(
        [*LAUNCH, "distill", "recipe.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode != 0
    (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "training.accelerator_config.split_batches shares each batch of 3 rows" in sentence
    assert "among 2 processes, which does not come out even; give a multiple of 2" in sentence
    assert "exitcode  : 2" in ended.stderr, "the launcher tells what the processes ended with"
    assert contents(folder) == before
