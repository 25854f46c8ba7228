"""All bad inputs, by kind."""

from bad_inputs.cases import BadInput
from bad_inputs.checkpoint_cases import CHECKPOINTS
from bad_inputs.command_cases import COMMANDS
from bad_inputs.data_cases import DATA
from bad_inputs.model_cases import MODELS
from bad_inputs.recipe_cases import RECIPES
from bad_inputs.tokenizer_cases import TOKENIZERS

BAD_INPUTS: dict[str, list[BadInput]] = {
    "recipe": RECIPES,
    "data": DATA,
    "tokenizer": TOKENIZERS,
    "model": MODELS,
    "checkpoint": CHECKPOINTS,
    "cli": COMMANDS,
}
