"""`python -m elder_jax.main` is the same as `elder_jax prune`."""

from elder_jax.commands import run_verb

if __name__ == '__main__':
  run_verb('prune')
