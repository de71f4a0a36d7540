"""README's table: perplexity over that of the dense model, before and after healing, from the reports of two runs.

elder_jax prune --config=smollm2_135m_league --workdir=LEAGUE
elder_jax prune --config=smollm2_135m_healing --workdir=HEALING
python -m benchmarks.headline LEAGUE HEALING      saves their figures; python -m benchmarks.docs writes the table
"""

import json
import pathlib
import sys

from elder_jax.log import write_json
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table

KEPT = pathlib.Path(__file__).parent / 'headline.json'
CORPUS, LAYERS = 'wikipedia', 7
# (what README calls it, arXiv number, recipe, the same with training, whether it leaves a stock checkpoint)
ROWS = (
  ('remove the layers', '', 'none', 'prune_then_train', 'yes'),
  ('Prune&Comp', '2507.18212', 'prune_comp', '', 'yes'),
  ('LinearPatch, not tuned', '2505.24680', 'linear_patch', '', 'no'),
  ('ReplaceMe', '2505.02819', 'replace_linear', 'replace_linear_then_train', 'yes'),
  ('Ghosted Layers', '2605.15491', 'ghosted', '', 'no'),
  ('**absorb** (default)', '', 'absorb', 'absorb_then_train', 'yes'),
)


def ratios(report: dict) -> dict[str, float]:
  """{recipe: perplexity over that of the dense model}, of the rows without LAYERS layers."""
  dense = report['ppl'][CORPUS]['dense']
  return {row['recipe']: row['ppl'][CORPUS] / dense for row in report['rows'] if len(row['removed']) == LAYERS}


def table() -> str:
  league, healing = json.loads(KEPT.read_text(encoding='utf-8'))
  best = [min(found.values()) for found in (league, healing)]

  def cell(value: float | None, least: float) -> str:
    return '' if value is None else f'**{figure(value)}**' if value == least else figure(value)

  rows = [['dense model, 30 layers', '', figure(1), figure(1), '']]
  for name, paper, untrained, trained, stock in ROWS:
    source = f'[{paper}](https://arxiv.org/abs/{paper})' if paper else 'this project' if 'absorb' in name else ''
    rows.append([name, source, cell(league[untrained], best[0]), cell(healing.get(trained), best[1]), stock])
  return markdown_table(['method', 'source', 'no training', 'after healing', 'stock checkpoint'], rows, 2) + '\n'


if __name__ == '__main__':
  reports = [json.loads((pathlib.Path(run) / 'report.json').read_text(encoding='utf-8')) for run in sys.argv[1:3]]
  write_json(KEPT, [ratios(report) for report in reports])
