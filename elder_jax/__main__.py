"""`python -m elder_jax` is the same as `elder_jax`."""

from elder_jax.commands import main

if __name__ == '__main__':
  main()
