"""Local task files for lm-evaluation-harness, for where no model hub is reached.

  python -m benchmarks.tasks --out=FOLDER --piqa=FOLDER --bigbench
  elder_jax eval --model=MODEL --tasks_dir=FOLDER --tasks=piqa,social_iqa,winogrande_objects

--piqa names a folder with PIQA's own valid.jsonl and valid-labels.lst. --bigbench fetches the PyPI package bigbench==1.0.0
(358 MB, not kept) and takes two tasks from it: SocialIQA's 1954 validation questions, and the 9000 sentences about objects
that WinoGrande was chosen from. The latter are not WinoGrande's validation set: their figures compare models with one
another, not with published ones. Prompts and choices are those of the harness's tasks piqa, social_iqa and winogrande.
BIG-bench asks that its data be in no training corpus: do not publish what this writes.
"""

import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

from absl import app
from absl import flags

_OUT = flags.DEFINE_string('out', None, 'Folder for the task files; made if missing.', required=True)
_PIQA = flags.DEFINE_string('piqa', None, "Folder with PIQA's valid.jsonl and valid-labels.lst.")
_BIGBENCH = flags.DEFINE_boolean('bigbench', False, 'Fetch SocialIQA and sentences of WinoGrande.')

_PACKAGE = 'bigbench==1.0.0'
_MEMBERS = 'bigbench-1.0.0/bigbench/benchmark_tasks/'
_SOCIAL_IQA = 'social_iqa/task.json'
_WINOGRANDE = 'natural_instructions/subtask029_winogrande_full_object/task.json'
SHA256 = {
  _SOCIAL_IQA: 'edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348',
  _WINOGRANDE: '0b50034573d26f63b0b270ac6229ea3535fe4981cb98a8af4c3e184f1635fda2',
}
# The parts of a task file that are not the same for all.
PROMPTS = {
  'piqa': {'doc_to_text': 'Question: {{goal}}\nAnswer:', 'doc_to_choice': '{{[sol1, sol2]}}', 'doc_to_target': 'label'},
  'social_iqa': {'doc_to_text': 'Q: {{question}}\nA:', 'doc_to_choice': '{{choices}}', 'doc_to_target': 'label'},
  # Two contexts and one continuation, as in the harness's winogrande: what follows the blank is scored.
  'winogrande_objects': {'doc_to_text': 'label', 'doc_to_choice': '{{contexts}}', 'doc_to_target': 'continuation'},
}


def piqa(folder: pathlib.Path) -> list[dict]:
  """Rows of PIQA's official files: goal, sol1, sol2, label."""
  questions = (folder / 'valid.jsonl').read_text(encoding='utf-8').splitlines()
  labels = (folder / 'valid-labels.lst').read_text().split()
  if len(questions) != len(labels):
    sys.exit(f'tasks: {folder} has {len(questions)} questions and {len(labels)} labels; fetch both again.')
  return [json.loads(question) | {'label': int(label)} for question, label in zip(questions, labels)]


def social_iqa(task: dict) -> list[dict]:
  rows = []
  for example in task['examples']:
    scores = example['target_scores']
    label = list(scores.values()).index(1)
    rows.append({'question': example['input'].strip(), 'choices': list(scores), 'label': label})
  return rows


def winogrande_objects(task: dict) -> list[dict]:
  """Two rows per pair of sentences, which differ in a word, and so in what the blank stands for."""
  rows = []
  pair = re.compile(r'Sentence 1: (.*?)\nAnswer1:(.*?)\n\s*Sentence 2: (.*?)\nAnswer2:(.*)', re.DOTALL)
  for example in task['examples']:
    parts = [part.strip() for part in pair.fullmatch(example['target'][0].strip()).groups()]
    options = [answer.rstrip('.') for answer in parts[1::2]]
    for label, sentence in enumerate(parts[::2]):
      before, after = sentence.split('_')
      contexts = [before + option for option in options]
      rows.append({'contexts': contexts, 'continuation': after.strip(), 'label': label})
  return rows


def fetch() -> dict[str, dict]:
  """The members of SHA256, by name."""
  print(f'tasks: fetching {_PACKAGE}, 358 MB', flush=True)
  with tempfile.TemporaryDirectory() as scratch:
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary=bigbench', '-d', scratch]
    subprocess.run([*command, _PACKAGE], check=True)
    contents = {}
    with tarfile.open(next(pathlib.Path(scratch).glob('*.tar.gz'))) as archive:
      for member in archive:
        if (name := member.name.removeprefix(_MEMBERS)) in SHA256:
          contents[name] = archive.extractfile(member).read()
  for name, expected in SHA256.items():
    if (found := hashlib.sha256(contents.get(name, b'')).hexdigest()) != expected:
      sys.exit(f'tasks: {name} has sha256 {found}, not {expected}; the package changed, nothing was written.')
  return {name: json.loads(content) for name, content in contents.items()}


def write(folder: pathlib.Path, name: str, rows: list[dict]):
  """NAME.jsonl and NAME.yaml."""
  questions = folder / f'{name}.jsonl'
  questions.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  task = {
    'task': name,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'validation': questions.name}},
    'output_type': 'multiple_choice',
    'validation_split': 'validation',
    **PROMPTS[name],
    'metric_list': [{'metric': m, 'aggregation': 'mean', 'higher_is_better': True} for m in ('acc', 'acc_norm')],
    'metadata': {'version': 1.0},
  }
  # JSON is YAML.
  (folder / f'{name}.yaml').write_text(json.dumps(task, indent=2) + '\n', encoding='utf-8')
  print(f'tasks: {folder / name}.yaml, {len(rows)} questions', flush=True)


def main(argv: list[str]):
  del argv
  out = pathlib.Path(_OUT.value).expanduser()
  out.mkdir(parents=True, exist_ok=True)
  if _PIQA.value:
    write(out, 'piqa', piqa(pathlib.Path(_PIQA.value).expanduser()))
  if _BIGBENCH.value:
    fetched = fetch()
    write(out, 'social_iqa', social_iqa(fetched[_SOCIAL_IQA]))
    write(out, 'winogrande_objects', winogrande_objects(fetched[_WINOGRANDE]))


if __name__ == '__main__':
  app.run(main)
