"""Studies: the same recipe in several variants, each trained with several seeds, and what the numbers say.

``plan`` reads a study file into runs, ``runner`` has each trained by a process of its own (``child``), ``scores``
collects what is finished, ``statistics`` compares it and ``results`` writes it down. The package itself imports
nothing, so that a plan can be checked without waiting for torch.
"""
