"""elder_jax: make language models shallower by regularising layers first and pruning them then."""

__version__ = '0.1.0'
