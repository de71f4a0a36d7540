"""Each flag changes what it should: a table with a small run per row, and a row for every setting."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from tiny import config_of

from elder_jax.run import pipeline
from elder_jax.run.config import PLACES

TESTS = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@dataclasses.dataclass
class Outcome:
  """The results of a run."""

  report: dict
  lines: list[dict]  # metrics.jsonl
  tensors: dict[str, np.ndarray]
  export: pathlib.Path

  def of(self, stage: str, key: str) -> np.ndarray:
    return np.array([line[key] for line in self.lines if line['stage'] == stage])


def run(settings: dict) -> Outcome:
  report, work = pipeline.run(config_of(**settings)), pathlib.Path(settings['workdir'])
  metrics = work / 'metrics.jsonl'
  lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
  files = (work / 'export').glob('*.safetensors')
  tensors = {name: a for file in files for name, a in safetensors.numpy.load_file(file).items()}
  return Outcome(report, lines, tensors, work / 'export')


BASE = dict(
  method='elder',
  selection='iterative',
  gate_steps=1,
  recipe='regularize',
  compare=(),
  order='joint',
  train_steps=2,
  lambda2=0.1,
  checkpoint_every=0,
)
SCORING = dict(method='shortgpt', recipe='prune_then_train')


@pytest.fixture(scope='module')
def outcomes(tiny, text, tmp_path_factory):
  """Returns a function from settings to the Outcome of a run, which is cached."""
  done = {}

  def outcome(**settings) -> Outcome:
    key = json.dumps(settings, default=str, sort_keys=True)
    if key not in done:
      folder = tmp_path_factory.mktemp('run')
      jsonl = folder / 'text.jsonl'
      jsonl.write_text(json.dumps({'text': text.read_text(), 'other': text.read_text()[::-1]}) + '\n')
      usual = dict(model=str(tiny), workdir=str(folder / 'work'), train_data=str(text), eval_data={'text': str(text)})
      usual |= dict(seq_len=32, num_sequences=8, batch_size=4, eval_seq_len=32, eval_tokens=256, protect_first=1)
      usual |= dict(protect_last=1, verify='jax', num_remove=2, lr=1e-3, prompts='none')
      settings = {k: v.format(jsonl=jsonl) if isinstance(v, str) else v for k, v in settings.items()}
      done[key] = run(usual | BASE | settings)
    return done[key]

  return outcome


def ppl(outcome: Outcome) -> float:
  return outcome.report['ppl']['text']['pruned']


def changed(outcome: Outcome, other: Outcome) -> set[str]:
  """Names of the tensors in which two exports differ."""
  return {n for n in outcome.tensors if not np.array_equal(outcome.tensors[n], other.tensors[n])}


def near(a: Outcome, b: Outcome) -> bool:
  return np.isclose(ppl(a), ppl(b), rtol=1e-4)


def ratio(a: Outcome, b: Outcome, stage: str, key: str) -> float:
  """b's value of a metric in the first step, divided by a's."""
  return b.of(stage, key)[0] / a.of(stage, key)[0]


def asked(a: Outcome, b: Outcome):
  return zip(a.report['answers'], b.report['answers'])


def rates(outcome: Outcome) -> list[float]:
  """Learning rates of the training, relative to the peak."""
  return [round(float(rate) / 1e-3, 6) for rate in outcome.of('regularize', 'lr')]


def falls_later(a: Outcome, b: Outcome) -> bool:
  return rates(b)[0] == 1 and rates(b)[1] > rates(a)[1] and rates(b)[3] < rates(a)[3]


def dtypes(outcome: Outcome) -> set[str]:
  return {str(t.dtype) for t in outcome.tensors.values()}


MASK = dict(method=('mask',), mask_steps=2)
# Setting -> (its value, other settings of both runs, condition on the runs (a) without it and (b) with it).
TABLE = {
  # Which layers.
  'ratio': ((0.5,), dict(num_remove=None, **SCORING), lambda a, b: len(b.report['removed']) == 3),
  'num_remove': (1, {}, lambda a, b: len(b.report['removed']) == 1),
  'remove_layers': ((1, 4), dict(num_remove=None, **SCORING), lambda a, b: b.report['removed'] == [1, 4]),
  'method': (('last',), {}, lambda a, b: b.report['removed'] == [3, 4] and not b.report['gates']),
  'score_steps': (1, SCORING, lambda a, b: a.report['choices'][0]['scores'] != b.report['choices'][0]['scores']),
  'recipe': ('none', {}, lambda a, b: b.report['steps'] == 0 and not b.of('none', 'loss').size),
  'compare': (('none',), {}, lambda a, b: len(b.report['rows']) == 2 and b.report['rows'][0]['recipe'] == 'none'),
  'mask_steps': (
    3,
    MASK,
    lambda a, b: (a.of('mask', 'step').size, b.of('mask', 'step').size) == (2, 3),
  ),
  'mask_lr': (0.5, MASK, lambda a, b: np.allclose(b.of('mask', 'lr'), 0.5)),
  'mask_loss': ('lm', MASK, lambda a, b: 'kl' in a.lines[0] and 'kl' not in b.lines[0]),
  'swap_tries': (
    2,
    dict(method=('swaps',), swap_tries=1, compare=()),
    lambda a, b: [x.report['choices'][0]['tried'] for x in (a, b)] == [1, 2],
  ),
  # Gates.
  'gate': ('output', {}, lambda a, b: a.report['gates'] != b.report['gates']),
  'selection': ('one_shot', {}, lambda a, b: (len(a.report['gates']), len(b.report['gates'])) == (2, 1)),
  'lambda1': (0.5, {}, lambda a, b: np.isclose(ratio(a, b, 'gates', 'gate_l1'), 100)),
  'gate_lr': (0.03, {}, lambda a, b: np.allclose(b.of('gates', 'lr'), 0.03)),
  'gate_steps': (3, {}, lambda a, b: (a.of('gates', 'step').size, b.of('gates', 'step').size) == (2, 6)),
  'protect_first': (3, {}, lambda a, b: min(b.report['removed']) >= 3),
  'protect_last': (3, {}, lambda a, b: max(b.report['removed']) <= 2),
  # Training.
  'penalty': ('l1', {}, lambda a, b: ratio(a, b, 'regularize', 'penalty') > 3),
  'penalty_scale': ('none', {}, lambda a, b: ratio(a, b, 'regularize', 'penalty') > 3),
  'lambda2': (0.2, {}, lambda a, b: np.isclose(ratio(a, b, 'regularize', 'penalty'), 2, rtol=1e-4)),
  'lambda2_power': (1.0, {}, lambda a, b: np.isclose(ratio(a, b, 'regularize', 'penalty'), 0.5, rtol=1e-4)),
  'order': ('sequential', {}, lambda a, b: 0.2 < ratio(a, b, 'regularize', 'penalty') < 0.8),
  'anneal': (1.0, {}, lambda a, b: not np.isclose(ratio(a, b, 'regularize', 'lm_loss'), 1, rtol=1e-4)),
  'distill': (0.5, {}, lambda a, b: 'kl' in b.lines[-1] and 'kl' not in a.lines[-1]),
  'temperature': (
    2.0,
    dict(distill=0.5, **SCORING),
    lambda a, b: not np.isclose(ratio(a, b, 'prune_then_train', 'kl'), 1, rtol=1e-3),
  ),
  'distill_hidden': (
    0.5,
    SCORING,
    lambda a, b: np.allclose(
      b.of('prune_then_train', 'loss')[0], a.of('prune_then_train', 'loss')[0] + 0.5 * b.lines[0]['hidden'], rtol=1e-5
    ),
  ),
  'train_steps': (4, {}, lambda a, b: b.of('regularize', 'step').tolist() == [0, 1, 2, 3]),
  'lr': (2e-3, {}, lambda a, b: np.isclose(ratio(a, b, 'regularize', 'lr'), 2)),
  'warmup_ratio': (0.99, {}, lambda a, b: np.isclose(ratio(a, b, 'regularize', 'lr'), 0.5)),
  'lr_schedule': ('cosine', dict(train_steps=4), lambda a, b: rates(a) == [1, 0.75, 0.5, 0.25] and falls_later(a, b)),
  'lr_final': (0.5, dict(train_steps=4), lambda a, b: rates(b) == [1, 0.875, 0.75, 0.625]),
  'decay_ratio': (
    0.5,
    dict(train_steps=4, lr_schedule='wsd'),
    lambda a, b: rates(a) == [1, 1, 1, 1] and rates(b) == [1, 1, 1, 0.5],
  ),
  'weight_decay': (
    0.5,
    dict(train_steps=1),
    lambda a, b: changed(a, b) and not any('norm' in n for n in changed(a, b)),
  ),
  'grad_clip': (1e-9, {}, lambda a, b: changed(a, b) and np.isclose(ratio(a, b, 'regularize', 'grad_norm'), 1)),
  'grad_accum': (2, {}, near),
  'trainable': ('all', {}, lambda a, b: 'model.embed_tokens.weight' in changed(a, b)),
  'optimizer': ('lion', {}, lambda a, b: len(changed(a, b)) > 20),
  'moment_dtype': (
    'bfloat16',
    dict(optimizer='lion'),
    lambda a, b: changed(a, b) and np.isclose(ppl(a), ppl(b), rtol=0.05),
  ),
  'lora_rank': (2, {}, lambda a, b: any('norm' in n for n in changed(a, b))),
  'lora_alpha': (1.0, dict(lora_rank=2), lambda a, b: changed(a, b) and not any('norm' in n for n in changed(a, b))),
  # Texts.
  'train_data': ('{jsonl}', dict(text_column='other'), lambda a, b: changed(a, b)),
  'text_column': ('other', dict(train_data='{jsonl}'), lambda a, b: changed(a, b)),
  'bos': ('window', {}, lambda a, b: b.report['corpora']['text']['bos'] == 'window' and ppl(a) != ppl(b)),
  'train_tokens': (512, dict(train_steps=None), lambda a, b: (a.report['steps'], b.report['steps']) == (2, 4)),
  'validate_every': (
    1,
    {},
    lambda a, b: len(b.report['rows'][-1]['held_out']) == 3 and 'held_out' not in a.report['rows'][-1],
  ),
  'seq_len': (16, {}, lambda a, b: b.report['tokens_per_step'] == 64),
  'num_sequences': (16, dict(train_steps=None), lambda a, b: (a.report['steps'], b.report['steps']) == (2, 4)),
  'batch_size': (2, dict(train_steps=None), lambda a, b: (a.report['steps'], b.report['steps']) == (2, 4)),
  'shuffle': (False, {}, lambda a, b: changed(a, b)),
  'seed': (1, {}, lambda a, b: changed(a, b)),
  # Evaluation.
  'eval_data': ({}, {}, lambda a, b: a.report['ppl'] and not b.report['ppl']),
  'eval_seq_len': (16, {}, lambda a, b: b.report['corpora']['text']['windows'] == 16),
  'eval_tokens': (128, {}, lambda a, b: b.report['corpora']['text']['windows'] == 4),
  'eval_batch_size': (3, {}, near),
  'prompts': ('', {}, lambda a, b: len(b.report['answers']) == 5 and not a.report['answers']),
  'answer_tokens': (
    2,
    dict(prompts=''),
    lambda a, b: all(x['dense'].startswith(y['dense'][:1]) and x['dense'] != y['dense'] for x, y in asked(a, b)),
  ),
  # Computation and output.
  'dtype': (
    'bfloat16',
    {},
    lambda a, b: not np.isclose(ppl(a), ppl(b), rtol=1e-6) and np.isclose(ppl(a), ppl(b), rtol=0.05),
  ),
  'remat': ('full', {}, near),
  'export_dtype': ('float16', {}, lambda a, b: (dtypes(a), dtypes(b)) == ({'float32'}, {'float16'})),
  'shard_gb': (3e-5, {}, lambda a, b: len([*b.export.glob('*.safetensors')]) > len([*a.export.glob('*.safetensors')])),
  'verify': ('torch', {}, lambda a, b: 'torch' in b.report['verify'] and 'torch' not in a.report['verify']),
}
# Settings that change no measurement of a run, and the tests of their effects.
ELSEWHERE = {
  'model': 'hf/families_test.py::test_removing_two_layers',
  'tokenizer': 'hf/export_files_test.py::test_another_tokenizer_replaces_that_of_the_source',
  'teacher': 'commands/heal_test.py::test_heal_trains_on_the_teachers_predictions_and_reports_the_lineage',
  'kept_layers': 'commands/heal_test.py::test_heal_compares_the_streams_of_the_remaining_layers',
  'train_on': 'text/training_text_test.py::test_only_the_assistants_tokens_of_a_conversation_count',
  'documents': 'text/training_text_test.py::test_documents_are_separated',
  'validation_sequences': 'text/training_text_test.py::test_held_out_rows_come_first_from_each_source',
  'token_cache': 'text/training_text_test.py::test_tokens_are_made_once_for_the_same_content_and_options',
  'export': 'training/validation_test.py::test_the_best_state_is_exported',
  'layers_at': 'hf/by_name_test.py::test_layers_at_chooses_among_several_lists',
  'text_only': 'hf/multimodal_test.py::test_text_only_exports_the_language_model_alone',
  'push_to_hub': 'run/push_test.py::test_a_run_uploads_its_export_when_it_is_done',
  'export_format': 'hf/gguf_cut_test.py::test_the_cut_file_computes_bit_for_bit_what_the_pruned_model_does',
  'target_params': 'run/series_test.py::test_targets_of_size',
  'target_gb': 'run/series_test.py::test_targets_of_size',
  'target_speedup': 'run/series_test.py::test_target_of_speed',
  'max_ppl_increase': 'run/series_test.py::test_the_search_removes_as_many_layers_as_the_limit_allows',
  'rounds': 'run/series_test.py::test_two_rounds_equal_two_runs',
  'seeds': 'run/series_test.py::test_seeds_have_mean_and_deviation',
  'judge_steps': 'methods/contest_test.py::test_the_best_three_are_judged_after_training',
  'judge_by': 'methods/contest_test.py::test_the_users_own_function_decides',
  'workdir': 'run/end_to_end_test.py::test_report_and_work_folder',
  'tasks': 'text/zero_shot_test.py::test_the_command_and_a_run_give_the_same_figures',
  'tasks_dir': 'text/zero_shot_test.py::test_the_command_and_a_run_give_the_same_figures',
  'task_limit': 'text/zero_shot_test.py::test_accuracies_equal_the_hf_backend',
  'mesh': 'run/signals_test.py::test_from_8_devices_to_2_to_1_by_sigterm',
  'plan': 'run/plan_test.py::test_a_config_is_enough_and_a_fitting_plan_exits_with_0',
  'force': 'run/memory_test.py::test_force_starts_a_run_that_does_not_fit',
  'topology': 'run/plan_test.py::test_refusals',
  'checkpoint_every': 'run/resume_test.py::test_stage_1_resumes_exactly',
  'checkpoint_minutes': 'training/checkpoints_test.py::test_due_by_time_since_the_last_one',
  'track': 'run/tracking_test.py::test_tensorboard_has_every_step_once_when_a_run_resumes',
  'keep_checkpoints': 'training/checkpoints_test.py::test_a_damaged_newest_checkpoint_falls_back_to_the_previous_one',
}


@pytest.mark.parametrize('name', TABLE)
def test_a_flag_has_its_effect(outcomes, name):
  value, both, holds = TABLE[name]
  without = {'ratio': dict(num_remove=2), 'remove_layers': dict(num_remove=2)}.get(name, {})
  given = dict(num_remove=None) if name in ('ratio', 'remove_layers') else {}
  a, b = outcomes(**both | without), outcomes(**both | given | {name: value})
  assert a.report['verify']['jax'] <= 1e-4 and b.report['verify']['jax'] <= 1e-4
  assert holds(a, b)


def test_every_setting_has_a_test():
  assert TABLE.keys() | ELSEWHERE.keys() == PLACES.keys() and not TABLE.keys() & ELSEWHERE.keys()
  for where in ELSEWHERE.values():
    file, _, name = where.partition('::')
    assert f'def {name}(' in (TESTS / file).read_text(), where
