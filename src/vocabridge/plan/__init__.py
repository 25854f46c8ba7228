"""What a recipe will need before anything is loaded: bytes per rank, bytes on disk, and what to change first.

``recipe_plan`` (the whole plan) over ``models`` (built without memory), ``training_state`` (weights, gradients,
optimizer), ``activations``, ``step`` (the parts of a step), ``disk`` and ``changes``; ``tables`` shows it. The package
itself imports nothing, so that the command line can be read without waiting for torch.
"""
