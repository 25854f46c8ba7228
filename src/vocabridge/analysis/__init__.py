"""Analysis of a finished run: ``analyze`` (all of it) over ``finished_run``, ``attention``, ``probe``, ``heatmap``...

``finished_run`` loads embeddings and query projectors, ``attention`` gives the attention of every example before and
after training and its bounds, ``measures`` and ``probe`` compare it with the byte-exact chunks, ``heatmap`` and
``point_cloud`` draw, ``training_distances`` reads what the trainer has logged. The package itself imports nothing.
"""
