"""The whole library in a minute: a tiny teacher is trained, then distilled into a tinier student with another tokenizer.

Nothing is downloaded: the text comes from a small grammar, both tokenizers and both models are made on the spot. The
same student is also trained without the teacher, for as many steps on the same rows, as the comparison.

    python examples/demo.py
"""

from __future__ import annotations

import json
import random
import shutil
import time
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from vocabridge import DistillationConfig, DistillationTrainer
from vocabridge.evaluation.evaluate import evaluate

BUILD = Path("build/demo")
SEED, BATCH_SIZE, TEACHER_STEPS, STUDENT_STEPS = 0, 32, 350, 250
PROBES = ("mmd_squared", "sliced_wasserstein", "two_sample_accuracy", "attention_in_chunk")
Rows = list[dict[str, Any]]

console = Console()

# --- text: who lives where, eats, keeps and plays what; each fact has three questions and three answers -----------------

PEOPLE = "Ada Bela Chiara David Elif Farid Grete Hugo Ines Jonas Kofi Lena Mario Nadia Omar Petra".split()
FACTS = {
    "Oslo Lima Cairo Paris Kyoto Accra Quito Delhi": (
        ("Where does {who} live?", "In which city is {who} at home?", "Tell me the town of {who}."),
        ("{who} lives in {what}.", "{who} is at home in {what}.", "The home of {who} is {what}."),
    ),
    "rice soup bread beans dates cheese noodles apples": (
        ("What does {who} eat?", "What is on the plate of {who}?", "Name the favourite food of {who}."),
        ("{who} eats {what}.", "{who} likes to eat {what}.", "The favourite food of {who} is {what}."),
    ),
    "dog cat horse goat parrot turtle rabbit donkey": (
        ("Which animal does {who} have?", "What runs around the house of {who}?", "Who waits for {who} at home?"),
        ("{who} has a {what}.", "A {what} lives with {who}.", "The animal of {who} is a {what}."),
    ),
    "piano violin flute drums guitar trumpet harp cello": (
        ("What does {who} play?", "Which instrument does {who} practise?", "What do the neighbours of {who} hear?"),
        ("{who} plays the {what}.", "{who} practises the {what}.", "The instrument of {who} is the {what}."),
    ),
}


def make_text() -> tuple[Rows, dict[str, Rows]]:
    """Training rows, and two tests: known facts in a wording they were never asked in; two facts asked at once."""
    rng = random.Random(SEED)
    train: Rows = []
    tests: dict[str, Rows] = {"in_domain": [], "out_of_domain": []}
    for who in PEOPLE:
        asked = []
        for things, (questions, answers) in FACTS.items():
            what = rng.choice(things.split())
            responses = [answer.format(who=who, what=what) for answer in rng.sample(answers, 3)]
            held_out, *others = [question.format(who=who) for question in rng.sample(questions, 3)]
            train += [{"prompt": q + "\n", "response": response} for q, response in product(others, responses)]
            tests["in_domain"].append({"prompt": held_out + "\n", "response": responses})
            asked.append((others[0], responses))
        (question, responses), (next_question, next_responses) = rng.sample(asked, 2)
        both = [" ".join(pair) for pair in product(responses, next_responses)]
        tests["out_of_domain"].append({"prompt": f"{question} {next_question}\n", "response": both})
    return train, tests


# --- tokenizers and models ----------------------------------------------------------------------------------------------


def byte_level_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """The student's: byte-level BPE, the family of GPT-2, Llama 3 and Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|pad|>", "<|end|>"]
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=400, special_tokens=control, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")


def sentencepiece_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """The teacher's: BPE with a visible space and byte fallback, the family of Llama 2, Mistral and Gemma."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    control, byte_pieces = ["<pad>", "<s>", "</s>", "<unk>"], [f"<0x{value:02X}>" for value in range(256)]
    backend.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=600, special_tokens=control + byte_pieces, show_progress=False)
    )
    state = json.loads(backend.to_str())  # the trainer made the byte pieces control tokens; they are ordinary ones
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
    backend = Tokenizer.from_str(json.dumps(state))
    spaces, start = decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), start])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), control, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


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


# --- training and reporting ---------------------------------------------------------------------------------------------


class ProgressBar(TrainerCallback):
    """One line a model, with the loss as it falls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.progress = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.task = self.progress.add_task(self.name, total=state.max_steps)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Show the loss, in nats per token of the model that is trained."""
        if "loss" in logs:
            self.progress.update(self.task, description=f"{self.name}  loss {logs['loss']:6.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave it on the screen."""
        self.progress.stop()


def train(name: str, student: LlamaForCausalLM, rows: Rows, *, steps: int, **what: Any) -> DistillationTrainer:
    """Train ``student`` and save it in a folder that ``from_pretrained`` reads."""
    args = DistillationConfig(
        output_dir=str(BUILD / name),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
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
    trainer = DistillationTrainer(student, args=args, train_dataset=rows, callbacks=[ProgressBar(name)], **what)
    trainer.remove_callback(PrinterCallback)  # the full log goes to metrics.jsonl in the folder
    trainer.train()
    trainer.save_model()
    return trainer


def main() -> None:
    """Text, tokenizers, teacher, both students, scores."""
    started = time.monotonic()
    shutil.rmtree(BUILD, ignore_errors=True)
    rows, tests = make_text()
    text = [row["prompt"] + row["response"] for row in rows]
    student_tokenizer, teacher_tokenizer = byte_level_tokenizer(text), sentencepiece_tokenizer(text)
    teacher = tiny_model(teacher_tokenizer, hidden_size=128, num_layers=4)
    train("teacher", teacher, rows, steps=TEACHER_STEPS, objective="cross_entropy", student_tokenizer=teacher_tokenizer)
    plain = tiny_model(student_tokenizer, hidden_size=64, num_layers=2)
    train("plain", plain, rows, steps=STUDENT_STEPS, objective="cross_entropy", student_tokenizer=student_tokenizer)
    distilled = tiny_model(student_tokenizer, hidden_size=64, num_layers=2)
    trainer = train(
        "distilled",
        distilled,
        rows,
        steps=STUDENT_STEPS,
        teacher=teacher,
        objective={"name": "dskd_cma", "matching": "gan"},
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
    )
    for name, model, tokenizer in (
        ("teacher", teacher, teacher_tokenizer),
        ("plain", plain, student_tokenizer),
        ("distilled", distilled, student_tokenizer),
    ):
        r = evaluate(
            model,
            tokenizer,
            files=tests,
            output_dir=BUILD / name / "evaluation",
            seeds=[0],
            temperature=0,
            max_new_tokens=32,
            batch_size=64,
        )
        print(name, r.in_domain, r.out_of_domain)
    probes = [entry for entry in trainer.state.log_history if "probe/mmd_squared" in entry]
    print(probes[0])
    print(probes[-1])
    print([e for e in trainer.state.log_history if "loss" in e][-1])
    print(len(student_tokenizer), len(teacher_tokenizer), len(rows), time.monotonic() - started)
    print(student_tokenizer.tokenize(text[0]), teacher_tokenizer.tokenize(text[0]))


if __name__ == "__main__":
    main()
