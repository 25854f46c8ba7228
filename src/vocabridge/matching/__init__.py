"""Key-query matching: terms that pull the distribution of queries to the distribution of keys.

Every term takes the packed queries ``[N, F]`` and keys ``[M, F]`` of supervised positions; padding and prompts reach it
only in the ablation ``gan.positions: all``. Its weight is independent of token counts.
"""
