"""`elder_jax VERB`: one file per verb, which is imported when it is asked for."""

import difflib
import importlib
import sys

import elder_jax
from elder_jax import errors

# Verb -> (module, what it does).
VERBS = {
  'prune': ('prune', 'choose layers, absorb and remove them, train, export: a whole run'),
  'heal': ('heal', 'train a model that was pruned before'),
  'plan': ('plan', 'what a run would take, before anything is loaded'),
  'generate': ('generate', 'what follows a prompt'),
  'chat': ('chat', 'talk with a model, by its chat template'),
  'speed': ('speed', 'dense against pruned, timed alternating'),
  'eval': ('evaluate', 'zero-shot tasks of lm-evaluation-harness'),
  'verify': ('verify', 'whether an exported folder holds the files that were written'),
  'export-gguf': ('export_gguf', 'an exported folder as a file for llama.cpp and Ollama'),
  'report': ('report', 'the tables of finished runs'),
  'models': ('models', 'the models that can be read'),
}


def main(argv: list[str] | None = None):
  """Runs a verb; ends the process unless all is well."""
  verb, *args = (sys.argv[1:] if argv is None else argv) or ['--help']
  if verb in ('-h', '-help', '--help', '--helpfull', 'help'):
    print(overview())
    return
  if verb in ('--version', 'version'):
    print(f'elder_jax {elder_jax.__version__}')
    return
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, n=2)
    hint = f'did you mean {" or ".join(near)}?' if near else f'these are: {", ".join(VERBS)}.'
    what = 'give a verb first, as in elder_jax prune --model=…;' if verb.startswith('-') else 'there is no such verb;'
    print(f'elder_jax: {errors.short(verb)}: {what} {hint}', file=sys.stderr)
    sys.exit(errors.BAD_INPUT)
  run_verb(verb, args)


def run_verb(verb: str, args: list[str] | None = None):
  """args: those of the process where they are not given."""
  module = importlib.import_module(f'elder_jax.commands.{VERBS[verb][0]}')
  module.COMMAND.main(sys.argv[1:] if args is None else args)


def overview() -> str:
  width = max(map(len, VERBS))
  verbs = [f'  {verb:<{width}}  {what}' for verb, (_, what) in VERBS.items()]
  return '\n'.join(
    [
      'Remove layers from a language model with as little damage as possible.',
      '',
      'usage: elder_jax VERB [--flag=value …]',
      '',
      *verbs,
      '',
      'elder_jax VERB --help   the flags of a verb, with examples',
      'elder_jax --version',
    ]
  )
