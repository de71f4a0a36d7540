"""The charts of a page, or of --png. Each has its figures as a table, too."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
import re
from typing import Any

from elder_jax.run import curve
from elder_jax.run import drawing
from elder_jax.run import plot
from elder_jax.run.page.data import Finished
from elder_jax.run.report import Model
from elder_jax.run.report import models_of
from elder_jax.run.report import reference_of
from elder_jax.run.report import tasks_of
from elder_jax.run.tables import figure
from elder_jax.run.tables import is_fraction
from elder_jax.run.tables import metric_figure
from elder_jax.run.tables import metric_values
from elder_jax.run.tables import ranges
from elder_jax.run.tables import task_head

MOST_CHARTS = 12  # of one kind; the table of all rows has the others
_BAR, _LINE = 38, 13  # points from one bar to the next, and for each line more of its label
_LONGEST = 3  # a bar is cut at so many times the longer one of the reference's and the exported row's


@dataclasses.dataclass(frozen=True)
class Chart:
  """A picture and its figures.

  name: of its file and its ids.
  about: a sentence below it.
  head, rows: a table of its figures.
  draw: (title, '' for none) -> matplotlib's figure.
  """

  name: str
  title: str
  about: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]
  draw: Callable[[str], Any]

  def __post_init__(self):
    object.__setattr__(self, 'name', re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-'))


@dataclasses.dataclass(frozen=True)
class Bar:
  """A row of a bar chart.

  value: NaN if there is none.
  text: the value for people.
  kind: its colour in drawing.py.
  strong: it is written in bold.
  """

  label: str
  value: float
  text: str
  kind: str = drawing.OTHER
  strong: bool = False
  error: float = math.nan


def perplexity(run: Finished) -> list[Chart]:
  """A chart for each corpus."""
  report, found = run.report, []
  for i, corpus in enumerate(list(report['ppl'])[:MOST_CHARTS]):
    bars = [_bar(report, model, model.ppl.get(corpus), figure(model.ppl.get(corpus))) for model in rivals(report)]
    about = report['corpora'].get(corpus, {})
    sentence = 'Lower is better.'
    if about.get('windows'):
      sentence += f' {about["windows"]} windows of {about["window"]} tokens.'
    found.append(bar_chart(f'perplexity-{i + 1}-{corpus}', f'Perplexity on {corpus}', sentence, bars, lower=True))
  return found


def tasks(run: Finished) -> list[Chart]:
  """A chart for each task."""
  report, found = run.report, []
  for i, (task, metric) in enumerate(list(tasks_of(report).items())[:MOST_CHARTS]):
    bars = []
    for model in rivals(report):
      values = model.tasks.get(task, {})
      value, error = metric_values(values, metric)
      bars.append(_bar(report, model, value, metric_figure(values, metric, 1), error))
    questions = next((values.get('n') for m in rivals(report) if (values := m.tasks.get(task))), None)
    sentence = 'Higher is better.' if is_fraction(metric) else ''
    sentence += f' {questions:,} questions, ± one standard error.' if isinstance(questions, int) else ''
    found.append(bar_chart(f'task-{i + 1}-{task}', task_head(task, metric), sentence.strip(), bars))
  return found


def rivals(report: dict) -> list[Model]:
  """The models to compare: those that are not pruned, and the rows with as many layers as the exported one."""
  models = models_of(report)
  depth = next(model.layers for model in models if model.exported)
  return [model for model in models if model.row is None or model.layers == depth or 'round' in model.row]


def _bar(report: dict, model: Model, value, text: str, error: float = math.nan) -> Bar:
  methods, value = {row['method'] for row in report['rows']}, drawing.drawable(value)
  label = model.name + (f', {model.method}' if model.method and len(methods) > 1 else '')
  if model.exported:
    return Bar(f'{label} (exported)', value, text, drawing.EXPORTED, True, error)
  reference = model.name == reference_of(report).name
  return Bar(label, value, text, drawing.DENSE if reference else drawing.OTHER, reference, error)


def strips(run: Finished) -> Chart | None:
  """The layers that go, for --png; the page has them as cells that fill its width."""
  report = run.report
  if not report['removed']:
    return None
  candidates = (report['choices'] or [{}])[0].get('candidates') or []
  choices = [(c['method'], c['removed']) for c in candidates] or [(report.get('method', ''), report['removed'])]
  rows = [[name, ranges(removed)] for name, removed in choices]
  draw = functools.partial(_draw_strips, report['num_layers'], choices)
  return Chart('layers', 'Layers removed', '', ['rule', 'layers removed'], rows, draw)


@drawing.style()
def _draw_strips(depth: int, choices: list[tuple[str, list[int]]], title: str):
  drawn = drawing.new_figure(_BAR * len(choices) + 52)
  axes = drawing.new_axes(drawn, 4, 24, 6, 28, title)
  axes.set(xlim=(-0.5, depth - 0.5), ylim=(_BAR * len(choices), 0), yticks=[])
  axes.spines[:].set_visible(False)
  axes.grid(visible=False)
  axes.xaxis.get_major_locator().set_params(integer=True)
  for i, (name, removed) in enumerate(choices):
    axes.text(-0.5, _BAR * i + 15, f'{name}: {ranges(removed)}', fontweight='normal' if i else 'bold')
    kept = [l for l in range(depth) if l not in removed]
    colour = drawing.OTHER if i else drawing.EXPORTED
    axes.barh(_BAR * i + 26, 0.9, 14, left=[l - 0.45 for l in kept], color=colour)
    look = {'color': drawing.PAPER, 'edgecolor': drawing.REMOVED, 'hatch': '//////', 'linewidth': 0.8}
    axes.barh(_BAR * i + 26, 0.9, 14, left=[l - 0.45 for l in removed], **look)
  return drawn


def bar_chart(name: str, title: str, about: str, bars: list[Bar], lower: bool = False) -> Chart:
  """lower: less is better, and what is far off does not set the scale."""
  known = [bar.value for bar in bars if not math.isnan(bar.value)]
  longest = max(known, default=1.0)
  if lower:
    main = [bar.value for bar in bars if bar.kind != drawing.OTHER and not math.isnan(bar.value)]
    longest = min(longest, _LONGEST * max(main, default=longest))
  if any(value > longest for value in known):
    about += ' » marks a bar that is cut off.'
  rows = [[bar.label, bar.text] for bar in bars]
  return Chart(name, title, about, ['model', title], rows, lambda title: _draw_bars(bars, longest, title))


@drawing.style()
def _draw_bars(bars: list[Bar], longest: float, title: str):
  labels = [drawing.wrapped(bar.label) for bar in bars]
  heights = [_BAR + _LINE * label.count('\n') for label in labels]
  above = 28 if title else 2
  drawn = drawing.new_figure(sum(heights) + above + 4)
  axes = drawing.new_axes(drawn, 4, 2, 2, above, title)
  axes.set_axis_off()
  ends = [min(bar.value, longest) + (bar.error if bar.error == bar.error else 0) for bar in bars]
  axes.set_xlim(0, 1.4 * max((end for end in ends if end == end), default=1) or 1)
  axes.set_ylim(sum(heights), 0)
  reference = next((bar.value for bar in bars if bar.kind == drawing.DENSE), math.nan)
  if reference <= longest:
    axes.axvline(reference, color=drawing.DENSE, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
  y = 0
  for bar, label, height in zip(bars, labels, heights):
    y += height
    look = {'fontweight': 'bold' if bar.strong else 'normal'}
    over_line = {'facecolor': drawing.PAPER, 'edgecolor': 'none', 'pad': 0.5}
    axes.text(0, y - 22, label, bbox=over_line, **look)
    end = min(bar.value, longest) if bar.value == bar.value else 0
    hatch = {'hatch': '////', 'edgecolor': drawing.PAPER, 'linewidth': 0} if bar.kind == drawing.DENSE else {}
    axes.barh(y - 13, end, 12, color=bar.kind, **hatch)
    if bar.error == bar.error:
      axes.errorbar(bar.value, y - 13, xerr=bar.error, color=drawing.INK, capsize=2, linewidth=1)
      end += bar.error
    text = f'» {bar.text}' if bar.value > longest else bar.text
    axes.text(end + 0.02 * longest, y - 9, text, bbox=over_line, **look)
  return drawn


def depths(run: Finished) -> list[Chart]:
  """Perplexity over layers, of runs with several depths."""
  report, found = run.report, []
  if len({len(row['removed']) for row in report['rows']}) < 2:
    return found
  for i, corpus in enumerate(list(report['ppl'])[:MOST_CHARTS]):
    rows = [
      [f'{m.name}, {m.method}' if m.method else m.name, str(m.layers), figure(m.ppl.get(corpus))]
      for m in models_of(report)
    ]
    draw = functools.partial(_draw_depths, report, corpus)
    head = ['model', 'layers', f'perplexity on {corpus}']
    about = 'Each line is a method and a recipe; all end in the dense model.'
    found.append(Chart(f'depth-{i + 1}-{corpus}', f'Perplexity on {corpus} over layers', about, head, rows, draw))
  return found


def _draw_depths(report: dict, corpus: str, title: str):
  return plot.figure_of(report, {corpus: title})


def losses(run: Finished) -> list[Chart]:
  """Held-out loss and training loss over tokens."""
  report, found = run.report, []
  if curve.curves_of(report):
    head, rows = curve.figures(report)
    about = 'On text that was never trained on. Lower is better.'
    found.append(
      Chart('held-out', 'Held-out loss, nats per token', about, head, rows, functools.partial(curve.figure_of, report))
    )
  if run.losses:
    shown = {i: points for i, points in run.losses.items() if any(report['rows'][i] is m.row for m in rivals(report))}
    rows = [report['rows'][i] for i in shown]
    curves = [
      (curve.name_of(rows, row), points, row is report['rows'][-1]) for row, points in zip(rows, shown.values())
    ]
    table = [
      [name, figure(points[0][1], 4), figure(points[-1][1], 4), f'{points[-1][0]:,}'] for name, points, _ in curves
    ]
    about = 'Loss on the text that is trained on' + (f', mean of {run.mean_of} steps.' if run.mean_of > 1 else '.')
    head = ['training loss, nats per token', 'first point', 'last point', 'tokens']
    draw = functools.partial(curve.lines_figure, curves, [])
    found.append(Chart('training', 'Training loss, nats per token', about, head, table, draw))
  return found


def gates(run: Finished) -> list[Chart]:
  """Learned gates by layer, one line per round."""
  found, seen = [], []
  for choice in [{'gates': run.report.get('gates')}, *run.report['choices']]:
    rounds = choice.get('gates')
    if not rounds or rounds in seen or len(found) == MOST_CHARTS:
      continue
    seen.append(rounds)
    removed = choice.get('chosen') or run.report['removed']
    head = ['layer', *(f'round {r + 1}' for r in range(len(rounds)))]
    rows = [[str(l), *(figure(gates[l], 3) for gates in rounds)] for l in range(len(rounds[-1]))]
    about = f'A layer whose gate is near 0 adds little. Removed: {ranges(removed)}.'
    draw = functools.partial(_draw_gates, rounds, removed)
    found.append(Chart(f'gates-{len(found) + 1}', 'Learned gates', about, head, rows, draw))
  return found


@drawing.style()
def _draw_gates(rounds: list[list[float]], removed: list[int], title: str):
  above = 24 if title else 8
  drawn = drawing.new_figure(234 + above)
  axes = drawing.new_axes(drawn, 40, 92, 10, above, title)
  for r, values in enumerate(rounds):
    last = r == len(rounds) - 1
    look = drawing.line(0) if last else {'color': drawing.OTHER, 'linewidth': 1}
    label = f'after round {r + 1}' if last else 'earlier rounds' if not r else None
    axes.plot([drawing.drawable(gate) for gate in values], label=label, **look)
  at = [l for l in removed if l < len(rounds[-1])]
  axes.scatter(
    at,
    [drawing.drawable(rounds[-1][l]) for l in at],
    color=drawing.REMOVED,
    marker='X',
    s=48,
    zorder=4,
    label='removed',
  )
  axes.set_xlabel('layer')
  axes.xaxis.get_major_locator().set_params(integer=True)
  drawing.legend(drawn)
  return drawn
