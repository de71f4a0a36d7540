"""Our adapter of lm-evaluation-harness against its hf backend, on a tiny model with a local task."""

import json
import types

import jax
import pytest
from tiny import config_of

from elder_jax.commands import evaluate
from elder_jax.commands.command import fail
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import Decoder
from elder_jax.run import pipeline
from elder_jax.run.report import table
from elder_jax.text import data
from elder_jax.text import zero_shot
from elder_jax.text.generation import generate

# The harness and its imports emit many warnings.
pytestmark = pytest.mark.filterwarnings('ignore')

MAX_LENGTH = 64
WORDS = [f'{i} times {i % 7} is {i * (i % 7)},' for i in range(200)]


def instance(*args):
  return types.SimpleNamespace(args=args)


@pytest.fixture(scope='module')
def both(tiny):
  """(our adapter, the harness's hf backend) on one model."""
  from lm_eval.models.huggingface import HFLM

  from elder_jax.text.lm_eval_adapter import JaxLM

  source = open_source(str(tiny), tiny)
  abstract = jax.eval_shape(lambda: Decoder(source.spec, source.num_layers, jax.random.key(0)))
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  model = load_model(source, 'float32', sharding.for_model(abstract, mesh, (1, 1, 1)))
  ours = JaxLM(model, data.load_tokenizer(str(tiny)), batch_size=5, max_length=MAX_LENGTH)
  theirs = HFLM(pretrained=str(tiny), device='cpu', dtype='float32', batch_size=5, max_length=MAX_LENGTH)
  return ours, theirs


def test_loglikelihoods_equal_the_hf_backend(both):
  """Contexts from empty to twice the model's, continuations of one or more tokens, and the same request twice."""
  ours, theirs = both
  requests = [
    instance(' '.join(WORDS[i : i + n]) if n else '', ' ' + ' '.join(WORDS[i + n :])[: 1 + 3 * (i % 9)])
    for i, n in enumerate([0, 1, 1, 2, 3, 5, 8, 1, 2, 0, 4, 6, 3, 1, 2])
  ]
  requests.append(requests[3])
  mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests)
  assert len(mine) == 16 and mine[3] == mine[15]
  for request, (a, greedy_a), (b, greedy_b) in zip(requests, mine, reference):
    tokens = len(ours.tok_encode(request.args[1]))
    assert abs(a - b) <= 1e-4 * tokens and greedy_a == greedy_b, request.args


def test_only_greedy_continuations_are_flagged(both):
  ours, _ = both
  context = ours.tok_encode(WORDS[0])
  (greedy,) = generate(ours.model, [context], 4)
  other = [*greedy[:3], (greedy[3] + 1) % 258]
  answers = ours._loglikelihood_tokens([(None, context, list(greedy)), (None, context, other)])
  assert [is_greedy for _, is_greedy in answers] == [True, False]


@pytest.mark.parametrize('last, positions', [(1, 32), (32, 32), (33, MAX_LENGTH)])
def test_only_continuations_are_projected_on_the_vocabulary(both, last, positions):
  ours, _ = both
  logp_BT, greedy_BT = ours._score([tuple(range(MAX_LENGTH + 1))], last)
  assert logp_BT.shape == greedy_BT.shape == (5, positions)


def test_rolling_equals_the_hf_backend(both):
  """Texts shorter than the context, and texts that need several windows."""
  ours, theirs = both
  requests = [instance(' '.join(WORDS[:n])) for n in (1, 4, 12, 30)]
  mine, reference = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
  for request, a, b in zip(requests, mine, reference):
    assert abs(a - b) <= 1e-4 * len(ours.tok_encode(request.args[0])), (a, b)


def test_generation_equals_the_hf_backend(both):
  ours, theirs = both
  settings = {'until': ['z9', '\n\n'], 'max_gen_toks': 12, 'do_sample': False}
  requests = [instance(' '.join(WORDS[i : i + n]), settings) for i, n in enumerate((1, 2, 3, 9))]
  requests.append(instance(WORDS[5], settings | {'max_gen_toks': 5}))
  mine = ours.generate_until(requests)
  assert mine == theirs.generate_until(requests)
  # A text ends before the stop string.
  end = mine[0][3:5]
  (cut,) = ours.generate_until([instance(requests[0].args[0], settings | {'until': [end]})])
  assert cut == mine[0][: mine[0].index(end)]


def test_unsupported_generation_settings_are_refused(both):
  ours, _ = both
  with pytest.raises(InputError, match='num_beams=4'):
    ours.generate_until([instance('a', {'until': ['b'], 'num_beams': 4})])
  with pytest.raises(InputError, match='64 new tokens'):
    ours.generate_until([instance('a', {'until': ['b'], 'max_gen_toks': 64})])


@pytest.fixture(scope='module')
def tasks_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tasks')
  rows = [
    {'q': WORDS[i].rpartition(' ')[0], 'a': ' ' + WORDS[i].split()[-1], 'b': f' {i * 3 + 1},,', 'label': i % 2}
    for i in range(24)
  ]
  (folder / 'sums.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (folder / 'sums.yaml').write_text(
    'task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: '
    'sums.jsonl\nvalidation_split: validation\noutput_type: multiple_choice\n'
    "doc_to_text: '{{q}}'\ndoc_to_choice: '{{[a, b]}}'\ndoc_to_target: label\ntarget_delimiter: ''\n"
    'metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n'
    '  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true\n'
  )
  return folder


@pytest.mark.slow  # the harness takes seconds to list its tasks
def test_accuracies_equal_the_hf_backend(both, tasks_dir):
  from lm_eval import evaluator

  ours, theirs = both
  loaded = zero_shot.load_tasks(['sums'], str(tasks_dir))
  mine = zero_shot.run(ours.model, ours.tokenizer, loaded, batch_size=4, max_length=MAX_LENGTH)['sums']
  reference = evaluator.evaluate(theirs, zero_shot.load_tasks(['sums'], str(tasks_dir)), log_samples=False)
  reference = reference['results']['sums']
  for name in ('acc', 'acc_stderr', 'acc_norm', 'acc_norm_stderr'):
    assert mine[name] == pytest.approx(reference[f'{name},none'], abs=1e-9)
  assert mine['n'] == 24 and 0 < mine['acc'] < 1 and mine['acc_stderr'] > 0
  short = zero_shot.run(ours.model, ours.tokenizer, loaded, limit=7, max_length=MAX_LENGTH)['sums']
  assert short['n'] == 7
  line = evaluate.table({'sums': mine}).splitlines()[-1]
  assert line.startswith(f'| sums | 24 | {100 * mine["acc"]:.2f} ± {100 * mine["acc_stderr"]:.2f} |')


@pytest.mark.slow
def test_the_command_and_a_run_give_the_same_figures(tasks_dir, tiny, settings, tmp_path, capsys):
  out = tmp_path / 'tasks.json'
  values = dict(model=str(tiny), tokenizer='', tasks=('sums',), tasks_dir=str(tasks_dir), limit=0, batch_size=4)
  command = evaluate.evaluate_model(evaluate.TaskSettings(**values, mesh=(1, 1, 1), out=str(out)))
  assert json.loads(out.read_text())['tasks'] == command['tasks'] and 'lm_eval' in command['versions']
  settings |= dict(
    tasks='sums', tasks_dir=str(tasks_dir), num_remove=None, remove_layers='2', recipe='none', mesh=(1, 1, 1)
  )
  report = pipeline.run(config_of(**settings))
  assert report['tasks']['dense'] == command['tasks']
  assert report['tasks']['pruned'] == report['rows'][-1]['tasks'] != report['tasks']['dense']
  assert '| sums, % |' in (tmp_path / 'work' / 'report.md').read_text()


@pytest.mark.slow  # the harness takes seconds to list its tasks
def test_if_tasks_fail_after_training_a_row_only_lacks_their_figures(tasks_dir, settings, monkeypatch, capsys):
  settings |= dict(tasks='sums', tasks_dir=str(tasks_dir), recipe='none', compare=(), method='last', mesh=(1, 1, 1))
  run_tasks, calls = zero_shot.run, []

  def fails_later(*args):
    calls.append(1)
    if len(calls) > 1:
      raise InputError('sums: the model gives nan.')
    return run_tasks(*args)

  monkeypatch.setattr(zero_shot, 'run', fails_later)
  report = pipeline.run(config_of(**settings))
  assert report['tasks']['dense']['sums']['n'] and report['tasks']['pruned'] == {}
  assert 'no task results for none: sums: the model gives nan.' in capsys.readouterr().err
  assert '| direct removal (exported) | 4 |' in table(report) and table(report).endswith(' — |')


@pytest.mark.slow  # the harness takes seconds to list its tasks
def test_bad_tasks_are_reported_in_one_sentence(tasks_dir, tmp_path):
  for names, folder, words in (
    (['nosuchtask'], '', ['--tasks=nosuchtask', 'no such task']),
    ([], '', ['--tasks=: is empty']),
    (['sums'], str(tmp_path / 'none'), ['--tasks_dir=', 'no such folder']),
  ):
    with pytest.raises(InputError) as e:
      zero_shot.load_tasks(names, folder)
    assert all(word in e.value.for_command() for word in words), e.value
  (tmp_path / 'broken.yaml').write_text((tasks_dir / 'sums.yaml').read_text().replace('sums.jsonl', 'gone.jsonl'))
  with pytest.raises(InputError, match='tasks=sums: the questions cannot be loaded'):
    zero_shot.load_tasks(['sums'], str(tmp_path))


def test_the_command_refuses_bad_flags(capsys):
  with pytest.raises(InputError, match='batch_size=0'):
    evaluate.TaskSettings(batch_size=0)
  with pytest.raises(SystemExit):
    fail(2, 'x')
  assert capsys.readouterr().err == 'elder_jax: x\n'
