"""Words of the command line."""

from __future__ import annotations

from bad_inputs.cases import DISTILL, BadInput

EVALUATE = ("evaluate", "student", "--data", "test.jsonl", "--max-new-tokens", "2")
GENERATE = ("generate-data", "teacher", "--data", "test.jsonl", "--max-new-tokens", "2", "--output")
INSPECT = ("inspect-pair", "student", "teacher", "--data", "test.jsonl")


def words(name: str, command: tuple[str, ...], *says: str) -> BadInput:
    return BadInput(name, says, command=command)


COMMANDS = [
    words("an unknown command", ("distil",), "No such command 'distil'", "See vocabridge --help"),
    words(
        "an unknown option",
        (*DISTILL, "--resum"),
        "No such option: --resum",
        "--resume",
        "See vocabridge distill --help",
    ),
    words("no recipe", ("validate",), "Missing argument 'RECIPE'", "See vocabridge validate --help"),
    words(
        "an override without a value",
        (*DISTILL, "training.seed"),
        "'training.seed' is no override",
        "section.key=value",
    ),
    words("an override through a value", (*DISTILL, "data.train.x=1"), "data.train is a value, it has no keys"),
    words("an override that is no YAML", (*DISTILL, "data.train=[a"), "not valid YAML", "quote it"),
    words("resume and overwrite", (*DISTILL, "--resume", "--overwrite"), "exclude each other"),
    words("a negative seed", (*EVALUATE, "--seeds", "1", "-2"), "-2", "See vocabridge evaluate --help"),
    words("a temperature that is no number", (*EVALUATE, "--temperature", "nan"), "'--temperature'"),
    words("a nucleus of nothing", (*EVALUATE, "--top-p", "0"), "top_p"),
    words("responses beyond the context", EVALUATE[:4], "max_new_tokens is 256", "at most 256", "lower it"),
    words("a data file twice", (*EVALUATE[:3], "test.jsonl", "test.jsonl"), "test.jsonl is given twice"),
    words(
        "a data file that is not there",
        ("evaluate", "student", "--data", "tset.jsonl"),
        "tset.jsonl: there is no such file",
        "did you mean 'test.jsonl'",
    ),
    words("an unknown domain", (*EVALUATE, "--in-domain", "dolly"), "there is no data file 'dolly'", "Known: test"),
    words("an engine that is not installed", (*EVALUATE, "--engine", "vllm"), "vllm"),
    words("scores into a file", (*EVALUATE, "--output-dir", "test.jsonl"), "test.jsonl is a file", "needs a folder"),
    words(
        "scores below a file",
        (*EVALUATE, "--output-dir", "test.jsonl/x"),
        "test.jsonl/x cannot be made",
        "name another",
    ),
    words("answers over the training data", (*GENERATE, "train.jsonl"), "train.jsonl exists", "--overwrite"),
    words("answers into a folder", (*GENERATE, "student"), "student is a folder", "name a file"),
    words("answers where no folder is", (*GENERATE, "no/x.jsonl"), "the folder no does not exist"),
    words(
        "the same answer twice",
        (*GENERATE, "x.jsonl", "--seeds", "1", "2"),
        "several seeds with temperature 0",
        "give one seed",
    ),
    words("a pair that cannot be cut so short", (*INSPECT, "--max-length", "4"), "'--max-length'", "8"),
    words(
        "a pair with one half missing",
        ("inspect-pair", "student", "./nowhere", "--data", "test.jsonl"),
        "folder './nowhere' does not exist",
    ),
    words("a report into a folder", (*INSPECT, "--json", "student"), "--json student", "is a folder"),
    words("memory in words", ("plan", "recipe.yaml", "--device-memory", "lots"), "--device-memory"),
    words("a plan into no folder", ("plan", "recipe.yaml", "--json", "no/p.json"), "the folder no does not exist"),
    words("a study that trains and does not", ("study", "study.yaml", "--dry-run", "--results"), "exclude each other"),
    words(
        "a report below a file",
        ("report", "study.yaml", "--output", "test.jsonl/x.html"),
        "--output test.jsonl/x.html cannot",
    ),
]
