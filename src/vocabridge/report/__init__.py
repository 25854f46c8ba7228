"""One self-contained HTML page about a study or a run: ``vocabridge report``.

``collect`` reads the files; ``wording``, ``results_tables``, ``training_charts``, ``probe_tables`` and ``facts`` turn
them into sentences, tables and charts; ``page`` fills the templates. Imports no torch.
"""
