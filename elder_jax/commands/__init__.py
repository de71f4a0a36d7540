"""`elder_jax VERB`: a module per verb, imported when the verb is run."""

import difflib
import importlib
import sys

import elder_jax
from elder_jax import errors

# Verb -> (module, what it does).
VERBS = {
  'prune': ('prune', 'choose layers, absorb and remove them, train, export: a whole run'),
  'heal': ('heal', 'train a model that was pruned before'),
  'plan': ('plan', 'print memory and time of a run before anything is loaded'),
  'generate': ('generate', 'continue a prompt'),
  'chat': ('chat', 'chat with a model, by its chat template'),
  'speed': ('speed', 'time the dense and the pruned model, alternating'),
  'eval': ('evaluate', 'run zero-shot tasks of lm-evaluation-harness'),
  'verify': ('verify', 'check the files of an exported folder'),
  'export-gguf': ('export_gguf', 'write an exported folder as a file for llama.cpp and Ollama'),
  'push': ('push', 'upload an exported folder to the Hugging Face hub'),
  'report': ('report', 'print the tables of finished runs'),
  'models': ('models', 'list the models that can be read'),
}


def main(argv: list[str] | None = None):
  """Runs a verb; exits the process unless it succeeds."""
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
  """Runs a verb with these arguments, by default those of the process."""
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
