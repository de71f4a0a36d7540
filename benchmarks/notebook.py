"""Runs docs/first_prune.ipynb on the demo's model and stores what it prints.

  python -m benchmarks.notebook      python -m benchmarks.assets fetches the model and the texts

Kept are the lines on stdout: warnings and progress bars differ from one computer to the next.
"""

import pathlib
import tempfile
import time

import nbclient
import nbformat

PATH = pathlib.Path(__file__).parents[1] / 'docs' / 'first_prune.ipynb'


def run(folder: str) -> nbformat.NotebookNode:
  """The notebook as it is after a run in this folder."""
  notebook = nbformat.read(PATH, 4)
  where = {'metadata': {'path': folder}}
  nbclient.NotebookClient(notebook, timeout=1200, kernel_name='python3', resources=where).execute()
  for cell in notebook.cells:
    cell.metadata.pop('execution', None)  # times
    if cell.cell_type == 'code':
      cell.outputs = [output for output in cell.outputs if output.get('name') == 'stdout']
  notebook.metadata.language_info = {'name': 'python'}
  return notebook


if __name__ == '__main__':
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as scratch:
    nbformat.write(run(scratch), PATH)
  print(f'notebook: {PATH}, {time.monotonic() - begun:.0f} s')
