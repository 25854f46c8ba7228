"""Models: ``spec`` (what a recipe says, torch-free), ``loading``, ``lora``, ``heads``, ``forward``.

The package itself imports nothing, so that ``vocabridge validate`` can read ``spec`` without waiting for torch.
"""
