"""What the demo is made of: a small world of facts to ask about, and two tokenizers of different families."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Rows = list[dict[str, Any]]

PEOPLE = "Ada Bela Chiara David Elif Farid Grete Hugo Ines Jonas Kofi Lena Mario Nadia Omar Petra"
FACTS = {  # what may be true of a person: three ways to ask for it, three ways to say it
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


@dataclass(frozen=True, slots=True)
class DemoText:
    """Rows to train on and to test with."""

    teacher: Rows = field(default_factory=list)
    """Two questions for every fact, each with all three answers."""
    student: Rows = field(default_factory=list)
    """The same questions, each with one answer chosen at random."""
    in_domain: Rows = field(default_factory=list)
    """The third question for every fact."""
    out_of_domain: Rows = field(default_factory=list)
    """Two questions at once."""


def make_text(seed: int) -> DemoText:
    """Draw the facts and the questions that are held out."""
    rng = random.Random(seed)
    text = DemoText()
    for who in PEOPLE.split():
        asked = []
        for things, (questions, answers) in FACTS.items():
            what = rng.choice(things.split())
            responses = [answer.format(who=who, what=what) for answer in answers]
            held_out, *others = [question.format(who=who) + "\n" for question in rng.sample(questions, 3)]
            text.teacher.extend({"prompt": prompt, "response": each} for prompt in others for each in responses)
            text.student.extend({"prompt": prompt, "response": rng.choice(responses)} for prompt in others)
            text.in_domain.append({"prompt": held_out, "response": rng.sample(responses, 3)})
            asked.append((others[0].strip(), responses))
        (question, responses), (next_question, next_responses) = rng.sample(asked, 2)
        both = [" ".join(pair) for pair in product(responses, next_responses)]
        text.out_of_domain.append({"prompt": f"{question} {next_question}\n", "response": rng.sample(both, len(both))})
    return text


def byte_level_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, the family of GPT-2, Llama 3 and Qwen; 400 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")


def sentencepiece_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """BPE with a visible space and byte fallback, the family of Llama 2, Mistral and Gemma; 600 tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    control, byte_pieces = ["<pad>", "<s>", "</s>", "<unk>"], [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=control + byte_pieces, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    state = json.loads(backend.to_str())  # the trainer made control tokens of the byte pieces, which are ordinary ones
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
    backend = Tokenizer.from_str(json.dumps(state))
    space = decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    backend.decoder = decoders.Sequence(
        [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
