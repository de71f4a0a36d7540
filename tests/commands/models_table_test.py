"""`elder_jax models`, and the page that contains its output."""

import pathlib

from elder_jax.commands import models
from elder_jax.hf import multimodal
from elder_jax.hf.families import FAMILIES

DOCS = pathlib.Path(__file__).parents[2] / 'docs'


def rows() -> dict[str, list[str]]:
  lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in models.table().splitlines()]
  return {line[1].strip('`'): line for line in lines[2:]}


def test_the_page_contains_the_printed_table(capsys):
  models.run(None)
  assert capsys.readouterr().out in (DOCS / 'models.md').read_text()


def test_every_model_type_has_a_row():
  assert [*rows()] == [*FAMILIES, *multimodal.KINDS]
  assert all(row[0] and len(row) == 9 for row in rows().values())


def test_cells_agree_with_what_recipes_refuse():
  found, names = (
    rows(),
    [name.strip('`') for name in models.table().splitlines()[0].strip('|').replace(' ', '').split('|')],
  )
  where = {name: names.index(name) for name in ('absorb', 'replace_linear')}
  assert found['gemma3_text'][where['absorb']] == 'yes' and not found['gemma3_text'][where['replace_linear']]
  assert found['gpt_oss'][where['absorb']] == 'yes' and not found['gpt_oss'][where['replace_linear']]
  assert found['llama'][where['replace_linear']] == 'yes'
