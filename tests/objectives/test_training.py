"""Every objective trains: 20 steps of the real trainer on the tiny pair, and a composition of several."""

import math
from pathlib import Path

import pytest

from tiny_pair import OBJECTIVE_SETTINGS, ROWS, student_model, teacher_model
from vocabridge.objectives import objective_info, objective_names
from vocabridge.trainer import DistillationTrainer
from vocabridge.training_arguments import DistillationConfig

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")

COMPOSITION = {
    "terms": [
        {"name": "cross_entropy", "weight": 0.5},
        {"name": "dskd_cma", "weight": 0.5, "matching": "gan", "gan": {"hidden_size": 16}},
        {"name": "hidden_state", "weight": 0.1},
    ]
}


def run_20_steps(objective, needs, tmp_path, student_tokenizer, teacher_tokenizer):
    if "same_tokenizer" in needs:
        teacher_tokenizer = student_tokenizer
    taught = "teacher" in needs
    trainer = DistillationTrainer(
        student_model(student_tokenizer),
        teacher_model(teacher_tokenizer) if taught else None,
        objective=objective,
        args=DistillationConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=20,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            diagnostics_steps=0,
        ),
        train_dataset=ROWS,
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer if taught else None,
    )
    before = {name: p.detach().clone() for name, p in trainer.distillation_model.named_parameters()}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 20
    assert all(math.isfinite(value) for entry in logged for value in entry.values()), logged
    assert logged[0]["grad_norm"] > 0
    moved = {name for name, p in trainer.distillation_model.named_parameters() if not p.equal(before[name])}
    assert moved == {name for name, p in trainer.distillation_model.named_parameters() if p.requires_grad}
    return logged


@pytest.mark.parametrize("name", objective_names())
def test_objective_trains(name, tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    config = objective_info(name).config_class
    objective = {"name": name, **OBJECTIVE_SETTINGS.get(name, {})}
    logged = run_20_steps(objective, config.needs, tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    key = "cross_entropy" if "teacher" in config.needs else "loss"
    assert logged[-1][key] < logged[0][key]
    undocumented = {key for key in logged[0] if not key.startswith("loss/") and f"`{key}`" not in GUIDE}
    assert undocumented <= {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    if "teacher" in config.needs:
        assert 0 < logged[0]["coverage"] <= 1


def test_composition_trains(tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    logged = run_20_steps(COMPOSITION, ("teacher",), tmp_path, tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    assert logged[-1]["loss/cross_entropy"] < logged[0]["loss/cross_entropy"]
    assert logged[0]["dskd_cma/coverage"] > 0
    assert logged[0]["hidden_state/coverage"] > 0
