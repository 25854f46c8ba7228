"""A small real question-answer set from the package ``chatterbot-corpus`` (BSD), split without leaks.

Everyday questions (facts, small talk, science, sport, ...) are the domain: four of five questions train, the fifth
tests. Questions about programming are the out-of-domain test. The corpus repeats itself, so rows are made unique, and
all answers to one question go to the same side of the split; a test question keeps all of them as references.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections import defaultdict
from pathlib import Path

import yaml

OUT_OF_DOMAIN = ("coding",)
TEST_SHARE = 0.2


def write_splits(folder: Path, *, seed: int = 0, max_test_questions: int = 48) -> dict[str, int]:
    """Write ``train.jsonl``, ``in_domain.jsonl`` and ``out_of_domain.jsonl``; returns the number of rows of each."""
    answers = _answers_by_question()
    everyday = sorted(question for question, (topic, _) in answers.items() if topic not in OUT_OF_DOMAIN)
    programming = sorted(question for question, (topic, _) in answers.items() if topic in OUT_OF_DOMAIN)
    rng = random.Random(seed)
    rng.shuffle(everyday)
    rng.shuffle(programming)
    num_test = int(len(everyday) * TEST_SHARE)
    splits = {
        "train": [_row(q, [answer]) for q in everyday[num_test:] for answer in answers[q][1]],
        "in_domain": [_row(q, answers[q][1]) for q in everyday[:num_test][:max_test_questions]],
        "out_of_domain": [_row(q, answers[q][1]) for q in programming[:max_test_questions]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(rows) for name, rows in splits.items()}


def _answers_by_question() -> dict[str, tuple[str, list[str]]]:
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise SystemExit("the package chatterbot-corpus is missing; run 'make venv'")
    found: dict[str, tuple[str, list[str]]] = defaultdict(lambda: ("", []))
    for path in sorted((Path(spec.origin).parent / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) < 2:
                continue
            question, answer = str(turns[0]).strip(), str(turns[1]).strip()
            topic, known = found[question]
            if " " in question and len(answer) > 1 and answer not in known:  # single words are topics, not questions
                found[question] = (topic or path.stem, [*known, answer])
    return {question: entry for question, entry in found.items() if entry[1]}


def _row(question: str, answers: list[str]) -> dict[str, object]:
    return {"prompt": question + "\n", "response": answers if len(answers) > 1 else answers[0]}
