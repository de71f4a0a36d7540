"""docs/first_prune.ipynb: it runs from start to end, here on a tiny model, and holds what a run on the real one printed."""

import json
import re

import nbformat
import pytest

from benchmarks.notebook import PATH
from benchmarks.notebook import run


def printed(cell) -> str:
  return ''.join(output['text'] for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # jupyter's own
def test_it_runs(tiny, text, tmp_path, monkeypatch):
  for name in ('wikipedia_train.txt', 'wikipedia_heldout.txt'):
    (tmp_path / name).write_text(text.read_text() * 2)
  monkeypatch.setenv('ELDER_JAX_NOTEBOOK_MODEL', str(tiny))
  monkeypatch.setenv('ELDER_JAX_NOTEBOOK_TEXTS', str(tmp_path))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('PYTHONPATH', str(PATH.parents[1]))
  notebook = run(str(tmp_path))
  cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == 'code'}
  assert printed(cells['load']).startswith('6 layers')
  (layer,) = json.loads(printed(cells['choose']).partition(': ')[2])
  assert 0 <= layer < 6
  measured = re.findall(r'^(\w[\w, ]*\w) +(\d) layers +perplexity ([\d.]+)$', printed(cells['measure']), re.MULTILINE)
  names = ['dense', 'removed', 'absorbed', 'absorbed, then trained']
  assert [row[:2] for row in measured] == list(zip(names, '6555'))
  ppl = {name: float(value) for name, _, value in measured}
  assert ppl['absorbed, then trained'] < ppl['absorbed']
  assert printed(cells['generate']).count('The capital of France is') == 4
  assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= set(printed(cells['export']).split())


def test_it_is_stored_with_what_a_run_printed():
  notebook = nbformat.read(PATH, 4)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert all(output.output_type == 'stream' and output.name == 'stdout' for cell in code for output in cell.outputs)
  assert [cell.id for cell in code if not cell.outputs] == ['names', 'train']
  text = PATH.read_text(encoding='utf-8')
  assert len(text) < 20_000 and not re.search(r'/(root|home|tmp|Users)/', text)
