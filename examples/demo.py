"""The whole library in a minute: a tiny teacher is trained, then distilled into a tinier student.

Nothing is downloaded: text, tokenizers and models are made on the spot. The teacher has read three answers to every
question; the student's rows hold one of them. The same student is also trained on those rows without the teacher, for
as many steps, as the comparison.

    python examples/demo.py
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from demo_text import Rows, byte_level_tokenizer, make_text, sentencepiece_tokenizer
from vocabridge import DistillationConfig, DistillationTrainer
from vocabridge.evaluation.evaluate import evaluate
from vocabridge.evaluation.results import EvaluationResult

BUILD = Path("build/demo")
SEED = 0
PROBES = ("mmd_squared", "sliced_wasserstein", "energy_distance", "two_sample_accuracy", "attention_in_chunk")

console = Console()


def main() -> None:
    """Text, tokenizers, teacher, both students, scores."""
    started = time.monotonic()
    torch.set_num_threads(1)  # models this small gain little from a second thread, and sums keep their order
    disable_progress_bar()  # transformers has one even for saving a model
    shutil.rmtree(BUILD, ignore_errors=True)

    text = make_text(SEED)
    corpus = [row["prompt"] + row["response"] for row in text.teacher]
    student_tokenizer, teacher_tokenizer = byte_level_tokenizer(corpus), sentencepiece_tokenizer(corpus)
    teacher = tiny_model(teacher_tokenizer, hidden_size=128, num_layers=4)
    plain = tiny_model(student_tokenizer, hidden_size=64, num_layers=2)
    distilled = tiny_model(student_tokenizer, hidden_size=64, num_layers=2)

    train("teacher", teacher, text.teacher, objective="cross_entropy", steps=350, student_tokenizer=teacher_tokenizer)
    train("plain", plain, text.student, objective="cross_entropy", steps=250, student_tokenizer=student_tokenizer)
    trainer = train(
        "distilled",
        distilled,
        text.student,
        objective={"name": "dskd_cma", "matching": "gan"},
        steps=250,
        student_tokenizer=student_tokenizer,
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
    )

    tests = {"in_domain": text.in_domain, "out_of_domain": text.out_of_domain}
    scores = {
        "teacher": score("teacher", teacher, teacher_tokenizer, tests),
        "plain student": score("plain", plain, student_tokenizer, tests),
        "distilled student": score("distilled", distilled, student_tokenizer, tests),
    }
    show_scores(scores)
    show_probes(trainer)
    console.print(
        "A toy with a single seed: it shows the parts at work, not how good the method is. Each folder in "
        f"{BUILD} is a Hugging Face checkpoint with its log (metrics.jsonl) and its answers (evaluation/predictions). "
        f"It took {time.monotonic() - started:.0f} seconds."
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones at every call."""
    set_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(name: str, model: LlamaForCausalLM, rows: Rows, *, steps: int, **what: Any) -> DistillationTrainer:
    """Train ``model`` and save it in a folder that ``from_pretrained`` reads."""
    args = DistillationConfig(
        output_dir=str(BUILD / name),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        projector_learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=25,
        diagnostics_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
    )
    trainer = DistillationTrainer(model, args=args, train_dataset=rows, callbacks=[ProgressBar(name)], **what)
    trainer.remove_callback(PrinterCallback)  # every term goes to metrics.jsonl in the folder
    trainer.train()
    trainer.save_model()
    return trainer


class ProgressBar(TrainerCallback):
    """One line a model, with the loss as it falls."""

    def __init__(self, name: str) -> None:
        self.name = f"{name:<9}"
        self.progress = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.task = self.progress.add_task(self.name, total=state.max_steps)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Show the loss that is trained on."""
        if "loss" in logs:
            self.progress.update(self.task, description=f"{self.name} loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave it on the screen."""
        self.progress.stop()


def score(
    name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tests: dict[str, Rows]
) -> EvaluationResult:
    """Greedy answers to both tests, and what the references cost in bits."""
    return evaluate(
        model, tokenizer, files=tests, output_dir=BUILD / name / "evaluation", temperature=0, max_new_tokens=32
    )


def show_scores(scores: dict[str, EvaluationResult]) -> None:
    """One column a model."""
    table = Table("greedy answers", *scores, title="Scores (bits per byte of the references: lower is better)")
    for domain in ("in_domain", "out_of_domain"):
        averages = [getattr(result, domain) for result in scores.values()]
        table.add_row(f"{domain} ROUGE-L", *(f"{average.rouge_l.mean:.1f}" for average in averages))
        table.add_row(f"{domain} exact match, %", *(f"{average.exact_match.mean:.1f}" for average in averages))
        table.add_row(f"{domain} bits/byte", *(f"{average.bits_per_byte:.3f}" for average in averages))
    console.print(table)


def show_probes(trainer: DistillationTrainer) -> None:
    """What training did to the queries and keys of the cross-model attention."""
    first, *_, last = [entry for entry in trainer.state.log_history if "probe/mmd_squared" in entry]
    table = Table("measurement", "before", "after", title="Queries and keys of the cross-model attention")
    for name in PROBES:
        table.add_row(name, f"{first[f'probe/{name}']:.4f}", f"{last[f'probe/{name}']:.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
