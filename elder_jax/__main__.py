"""`python -m elder_jax VERB …` is `elder_jax VERB …`."""

from elder_jax.commands import main

if __name__ == '__main__':
  main()
