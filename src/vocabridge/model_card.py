"""The README.md of a run folder: how this student was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from vocabridge.durable import write_in_one_piece
from vocabridge.recipe import Recipe

_TEXT = """---
{metadata}
---

# {name}

Student `{student}`{taught}, trained by vocabridge with the objective
`{objective}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

- Prompt template: `{template}`.
- Training data: {data}.
- Optimizer steps: {steps}; seed {seed}. Last logged training loss: {loss}.
- To repeat the run: `recipe.yaml` (resolved), `run.json` (versions, commit, machine); its log is `metrics.jsonl`.
{learned}
The licences of both models and of the data apply to this model; this card cannot know them.
"""


def write_model_card(
    run_dir: Path, recipe: Recipe, *, steps: int, seed: int, last_log: Mapping[str, float], has_learned_parts: bool
) -> None:
    """Write ``README.md`` into the run folder."""
    teacher = recipe.teacher.model if recipe.teacher else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["vocabridge", "knowledge-distillation", *(term.name for term in recipe.objective.terms)],
        model_name=run_dir.name,
    )
    loss = last_log.get("loss")
    text = _TEXT.format(
        metadata=data.to_yaml(),
        name=run_dir.name,
        folder=_address(recipe) or run_dir,
        student=recipe.student.model,
        taught=f", taught by `{teacher}`" if teacher else "",
        objective=recipe.objective.name,
        template=recipe.student.template,
        data=", ".join(f"`{name}`" for name in recipe.data.train),
        steps=steps,
        seed=seed,
        loss="none" if loss is None else f"{loss:.4f}",
        learned="- `objective.safetensors` holds the objective's learned parts (projectors, discriminator); "
        "inference does not need it.\n"
        if has_learned_parts
        else "",
    )
    write_in_one_piece(run_dir / "README.md", text)


def _address(recipe: Recipe) -> str | None:
    """Where readers of the card find the student, if it is uploaded under a name that is known."""
    training = recipe.training.arguments()
    return training.get("hub_model_id") if training.get("push_to_hub") else None
