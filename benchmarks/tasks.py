"""Writes local task files for lm-evaluation-harness, for machines without access to the model hub.

  python -m benchmarks.tasks --out=FOLDER --piqa=FOLDER --bigbench --last_word=TEXT
  elder_jax eval --model=MODEL --tasks_dir=FOLDER --tasks=piqa,social_iqa,winogrande_objects,last_word

--piqa names a folder with PIQA's valid.jsonl and valid-labels.lst. --bigbench downloads the PyPI package bigbench==1.0.0
(358 MB, not kept) and reads two tasks from it: SocialIQA's 1954 validation questions, and the 9000 sentences about objects
that WinoGrande was selected from. The latter are not WinoGrande's validation set, so their figures are not comparable to
published ones. Prompts and choices are those of the harness's tasks piqa, social_iqa and winogrande. BIG-bench requires
that its data be kept out of training corpora: do not publish these files.

--last_word makes a task like LAMBADA from a text with one document per line. The model reads some sentences and completes
the last word of the next one. The word must occur in those sentences, as in most of LAMBADA. LAMBADA's passages were also
selected by people, so the figures are not comparable to published ones.
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

_OUT = flags.DEFINE_string('out', None, 'Folder for the task files; created if missing.', required=True)
_PIQA = flags.DEFINE_string('piqa', None, "Folder with PIQA's valid.jsonl and valid-labels.lst.")
_BIGBENCH = flags.DEFINE_boolean('bigbench', False, 'Download SocialIQA and sentences of WinoGrande.')
_LAST_WORD = flags.DEFINE_string(
  'last_word', None, 'A text with one document per line, ideally one that no model was trained on.'
)

CONTEXT = 4  # sentences before the one to complete
_PACKAGE = 'bigbench==1.0.0'
_MEMBERS = 'bigbench-1.0.0/bigbench/benchmark_tasks/'
_SOCIAL_IQA = 'social_iqa/task.json'
_WINOGRANDE = 'natural_instructions/subtask029_winogrande_full_object/task.json'
SHA256 = {
  _SOCIAL_IQA: 'edc9f568b70ae6d4af0783764dbe4e4f18aa1242c675a93f534338d73a565348',
  _WINOGRANDE: '0b50034573d26f63b0b270ac6229ea3535fe4981cb98a8af4c3e184f1635fda2',
}


def _metrics(**aggregations: str) -> list[dict]:
  lower = ('perplexity',)
  return [{'metric': m, 'aggregation': a, 'higher_is_better': m not in lower} for m, a in aggregations.items()]


_CHOICE = {'output_type': 'multiple_choice', 'metric_list': _metrics(acc='mean', acc_norm='mean')}
# The parts of a task file that differ between tasks.
TASKS = {
  'piqa': {
    **_CHOICE,
    'doc_to_text': 'Question: {{goal}}\nAnswer:',
    'doc_to_choice': '{{[sol1, sol2]}}',
    'doc_to_target': 'label',
  },
  'social_iqa': {
    **_CHOICE,
    'doc_to_text': 'Q: {{question}}\nA:',
    'doc_to_choice': '{{choices}}',
    'doc_to_target': 'label',
  },
  # Two contexts and one continuation, as in the harness's winogrande: the text after the blank is scored.
  'winogrande_objects': {
    **_CHOICE,
    'doc_to_text': 'label',
    'doc_to_choice': '{{contexts}}',
    'doc_to_target': 'continuation',
  },
  # As in the harness's lambada_openai.
  'last_word': {
    'output_type': 'loglikelihood',
    'metric_list': _metrics(acc='mean', perplexity='perplexity'),
    'doc_to_text': '{{passage}}',
    'doc_to_target': ' {{word}}',
  },
}


def piqa(folder: pathlib.Path) -> list[dict]:
  """Rows of PIQA's official files: goal, sol1, sol2, label."""
  questions = (folder / 'valid.jsonl').read_text(encoding='utf-8').splitlines()
  labels = (folder / 'valid-labels.lst').read_text().split()
  if len(questions) != len(labels):
    sys.exit(f'tasks: {folder} has {len(questions)} questions and {len(labels)} labels; download both again.')
  return [json.loads(question) | {'label': int(label)} for question, label in zip(questions, labels)]


def social_iqa(task: dict) -> list[dict]:
  rows = []
  for example in task['examples']:
    scores = example['target_scores']
    label = list(scores.values()).index(1)
    rows.append({'question': example['input'].strip(), 'choices': list(scores), 'label': label})
  return rows


def winogrande_objects(task: dict) -> list[dict]:
  """Two rows per pair of sentences. The sentences differ in one word, and so in the referent of the blank."""
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


def last_words(text: str) -> list[dict]:
  """{'passage': CONTEXT sentences and the next one without its last word, 'word': that word, which occurs in them}."""
  rows = []
  for document in text.splitlines():
    sentences = re.split(r'(?:(?<=[.!?])|(?<=[.!?]")) +(?=[A-Z"])', document.strip())
    for end in range(CONTEXT, len(sentences)):
      before = ' '.join(sentences[end - CONTEXT : end])
      start, _, word = sentences[end].rstrip('.!?"').rpartition(' ')
      known = re.search(rf'\b{re.escape(word)}\b', before) and not re.search(rf'\b{re.escape(word)}\b', start)
      if start and re.fullmatch('[A-Za-z]{4,}', word) and known:
        rows.append({'passage': f'{before} {start}', 'word': word})
  return rows


def fetch() -> dict[str, dict]:
  """Downloads the files of SHA256. Returns them by name."""
  print(f'tasks: downloading {_PACKAGE}, 358 MB', flush=True)
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
      sys.exit(f'tasks: {name} has sha256 {found}, not {expected}; the package changed, and nothing was written.')
  return {name: json.loads(content) for name, content in contents.items()}


def write(folder: pathlib.Path, name: str, rows: list[dict]):
  """Writes NAME.jsonl and NAME.yaml."""
  questions = folder / f'{name}.jsonl'
  questions.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  task = {
    'task': name,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'validation': questions.name}},
    'validation_split': 'validation',
    **TASKS[name],
    'metadata': {'version': 1.0},
  }
  # JSON is also valid YAML.
  (folder / f'{name}.yaml').write_text(json.dumps(task, indent=2) + '\n', encoding='utf-8')
  print(f'tasks: {folder / name}.yaml, {len(rows)} questions', flush=True)


def main(argv: list[str]):
  del argv
  out = pathlib.Path(_OUT.value).expanduser()
  out.mkdir(parents=True, exist_ok=True)
  if _PIQA.value:
    write(out, 'piqa', piqa(pathlib.Path(_PIQA.value).expanduser()))
  if _LAST_WORD.value:
    write(out, 'last_word', last_words(pathlib.Path(_LAST_WORD.value).expanduser().read_text(encoding='utf-8')))
  if _BIGBENCH.value:
    fetched = fetch()
    write(out, 'social_iqa', social_iqa(fetched[_SOCIAL_IQA]))
    write(out, 'winogrande_objects', winogrande_objects(fetched[_WINOGRANDE]))


if __name__ == '__main__':
  app.run(main)
