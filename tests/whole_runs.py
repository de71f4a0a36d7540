"""Shared by tests that compare whole runs: runs one, and returns the results that must be equal."""

import json
import pathlib

import safetensors.numpy
from tiny import config_of

from elder_jax.run import pipeline


def whole_run(settings, **more):
  return pipeline.run(config_of(**{**settings, **more}))


def left_behind(workdir, report) -> tuple:
  tensors = safetensors.numpy.load_file(pathlib.Path(workdir) / 'export' / 'model.safetensors')
  rows = [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
  lines = [{k: v for k, v in row.items() if k not in ('time', 'tokens_per_second')} for row in rows]
  return {k: v for k, v in report.items() if k not in ('seconds', 'device')}, tensors, lines
