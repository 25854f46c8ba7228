"""Data of the study: short rows of Dolly (training, test) and of Self-Instruct (test), in build/study/data.

    python studies/smollm2_gemma_dolly/prepare.py DOLLY_DIR SELF_INSTRUCT_FILE

DOLLY_DIR holds ``train.jsonl`` and ``test.jsonl`` with the split of 11K/1K/500 rows that the papers of this field use;
both sets are public (Dolly: CC BY-SA 3.0, Self-Instruct: Apache 2.0). Rows are short so that a processor can train on
enough of them; files keep their order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

OUTPUT = Path("build/study/data")
MAX_PROMPT_BYTES = 480
MAX_RESPONSE_BYTES = 320
ROWS = {"teacher": 960, "train": 192, "dolly": 64, "self-instruct": 64}


def main() -> None:
    """Write the four files."""
    if len(sys.argv) != 3:
        raise SystemExit("give the folder of Dolly and the file of Self-Instruct")
    dolly, self_instruct = Path(sys.argv[1]), Path(sys.argv[2])
    OUTPUT.mkdir(parents=True, exist_ok=True)
    train = list(short_rows(dolly / "train.jsonl"))
    # The student learns from rows that the teacher was tuned on, as in the papers.
    rows: dict[str, Iterable[dict[str, object]]] = {
        "teacher": train,
        "train": train,
        "dolly": short_rows(dolly / "test.jsonl"),
        "self-instruct": short_rows(self_instruct),
    }
    for name, some in rows.items():
        chosen = list(islice(some, ROWS[name]))
        if len(chosen) < ROWS[name]:
            raise SystemExit(f"{name}: {len(chosen)} short rows, {ROWS[name]} are needed")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        (OUTPUT / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{OUTPUT / name}.jsonl: {len(chosen)} rows")


def short_rows(path: Path) -> Iterator[dict[str, object]]:
    """Rows of one file whose prompt and first response are short."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            outputs = row["output"] if isinstance(row["output"], list) else [row["output"]]
            if len(row["prompt"].encode()) <= MAX_PROMPT_BYTES and 0 < len(outputs[0].encode()) <= MAX_RESPONSE_BYTES:
                yield {"prompt": row["prompt"], "output": outputs}


if __name__ == "__main__":
    main()
