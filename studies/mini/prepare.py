"""Data, tokenizers and base models of the mini study, made on the spot in build/study_mini (about a minute).

    python studies/mini/prepare.py

A small world: 16 people, four facts about each, three ways to ask and three to answer. Both models first read about
other people, so they know the language and not the facts. The teacher then reads every fact, twice asked and with all
three answers. The student's own rows ask the same, once answered each, and every third answer names a wrong thing: that
is what a teacher can mend and further training on the rows cannot.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

from demo_text import FACTS, PEOPLE, Rows, byte_level_tokenizer, sentencepiece_tokenizer  # noqa: E402

BUILD = Path("build/study_mini")
SEED = 0
OTHER_PEOPLE = (
    "Alma Bruno Carla Dario Edda Felix Gina Hans Ida Jan Karla Leo Mona Nils Olga Paul Rosa Sven Tina Udo Vera Willi "
    "Yara Zeno"
)
WRONG_SHARE = 1 / 3
NUM_OUT_OF_DOMAIN = 64


def main() -> None:
    """Write what is not there yet."""
    rows = make_rows(SEED)
    for name, some in rows.items():
        path = BUILD / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        print(f"{path}: {len(some)} rows")
    corpus = [f"{row['prompt']}{row['response']}" for row in rows["language"] + rows["teacher"]]
    write_start("student", byte_level_tokenizer(corpus), hidden_size=64, num_layers=2)
    write_start("teacher", sentencepiece_tokenizer(corpus), hidden_size=128, num_layers=4)
    for name in ("student", "teacher"):
        train_base(name)


def make_rows(seed: int) -> dict[str, Rows]:
    """The rows of every file; a test row has all right answers as references.

    The wording that tests a fact is one that trains other facts, so the test asks for nothing but the fact.
    """
    rng = random.Random(seed)
    rows: dict[str, Rows] = {
        "language": [],
        "teacher": [],
        "train": [],
        "in_domain": [],
        "out_of_domain": [],
    }
    for who in OTHER_PEOPLE.split():
        for things, (questions, answers) in FACTS.items():
            what = rng.choice(things.split())
            for question in questions:
                rows["language"].append(row(question, rng.choice(answers).format(who=who, what=what), who))
    double = []
    for who in PEOPLE.split():
        asked = []
        for things, (questions, answers) in FACTS.items():
            known = things.split()
            what = rng.choice(known)
            right = [answer.format(who=who, what=what) for answer in answers]
            held_out, *others = rng.sample(questions, 3)
            for question in others:
                rows["teacher"] += [row(question, answer, who) for answer in right]
                named = rng.choice([thing for thing in known if thing != what]) if rng.random() < WRONG_SHARE else what
                rows["train"].append(row(question, rng.choice(answers).format(who=who, what=named), who))
            rows["in_domain"].append(row(held_out, right, who))
            asked.append((others[0], right))
        for (first, right), (second, also_right) in permutations(asked, 2):
            double.append(row(f"{first} {second}", [" ".join(pair) for pair in product(right, also_right)], who))
    rows["out_of_domain"] = rng.sample(double, NUM_OUT_OF_DOMAIN)
    rows["teacher"] += rows["language"]
    return rows


def row(question: str, response: str | list[str], who: str) -> dict[str, object]:
    """One line of a file."""
    return {"prompt": question.format(who=who) + "\n", "response": response}


def write_start(name: str, tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int) -> None:
    """A Llama with random weights and its tokenizer, in a folder that ``from_pretrained`` reads."""
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
    folder = BUILD / f"{name}_start"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_base(name: str) -> None:
    """Train the base model by its recipe, unless it is there."""
    folder = BUILD / name
    if (folder / "model.safetensors").exists():
        print(f"{folder}: there already")
        return
    words = [sys.executable, "-m", "vocabridge", "distill", str(HERE / f"{name}.yaml")]
    if folder.exists():
        words.append("--resume")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # models this small gain little from more
    if status := subprocess.run(words, env=one_thread, check=False).returncode:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
