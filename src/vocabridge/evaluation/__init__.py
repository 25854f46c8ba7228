"""Evaluation: ``evaluate`` (the whole run) over ``plan``, ``generation``, ``bits``, ``metrics`` and ``run_folder``.

The package itself imports nothing, so that the metrics can be had without waiting for torch.
"""
