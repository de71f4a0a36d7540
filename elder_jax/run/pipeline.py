"""A run on one page: prepare, plan, run the stages, report. When it is started again, it resumes."""

import functools
import json
import pathlib
import shutil
import time

import jax

from elder_jax.devices import about
from elder_jax.devices import hosts
from elder_jax.devices import preemption
from elder_jax.errors import reason
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.run import packages
from elder_jax.run import tracking
from elder_jax.run import unused
from elder_jax.run import workdir
from elder_jax.run.clock import Clock
from elder_jax.run.config import Config
from elder_jax.run.job import Job
from elder_jax.run.job import Run
from elder_jax.run.plan import check as check_plan
from elder_jax.run.prepare import prepare
from elder_jax.run.results import bytes_on_disk
from elder_jax.run.results import make_report
from elder_jax.run.results import rehearse
from elder_jax.run.results import write_reports
from elder_jax.run.stages import Stage
from elder_jax.run.stages import stages as list_stages


def run(config: Config) -> dict:
  """Executes a run in its work folder and returns the report."""
  with workdir.held(config):
    hosts.leader_first(lambda: workdir.claim_workdir(config) if hosts.is_leader() else None)
    if report := workdir.finished(config):
      log(f'{config.path()} holds a finished run; printing its report without reading the inputs again')
      return report
    tracking.check(config.output.track)
    packages.check(config)
    job = prepare(config)
    track = tracking.tracked(job.log, config.output.track, config.path(), config.to_json())
    with track, workdir.noting_failure(config), jax.set_mesh(job.mesh):
      stages = list_stages(config, job.num_removes, hosts.broadcast_json(job.checks_source))
      rehearse(job, stages)
      preemption.listen_to_ctrl_c()
      return _run(job, stages)


def _run(job: Job, stages: list[Stage]) -> dict:
  for line in unused.unused_settings(job.config):
    log(line)
  run, seconds = Run(job, about.device_name), {}
  clock = Clock(job.log, stages, {} if job.copies else check_plan(job, stages, log))
  for i, stage in enumerate(stages):
    preemption.check()
    done = _saved(job, stage)
    if done is None and not _is_needless(job, stage, stages[i + 1 :]):
      done = clock.time(stage, functools.partial(_do, run, stage))
    if done is not None:
      seconds[stage.seconds] = done['seconds']
      stage.take(run, stage, done['result'])
  return _finish(run, seconds)


def _do(run: Run, stage: Stage) -> dict:
  start, loading = time.monotonic(), run.load_seconds
  result = stage.run(run, stage)
  taken = time.monotonic() - start - (run.load_seconds - loading)
  done = hosts.broadcast_json({'result': result, 'seconds': taken})
  if stage.keeps and hosts.is_leader():
    path = _path(run.job, stage)
    path.parent.mkdir(exist_ok=True)
    write_json(path, done)
  return done


def _is_needless(job: Job, stage: Stage, rest: list[Stage]) -> bool:
  """Whether a stage makes a model that is not exported and that an earlier attempt has measured already."""
  return stage.makes_model and not stage.exported and _saved(job, rest[0]) is not None


def _saved(job: Job, stage: Stage) -> dict | None:
  """Returns the saved result of a stage from an earlier attempt in this work folder, in all processes."""
  path = _path(job, stage)

  def read() -> dict | None:
    if not (stage.keeps and path.exists()):
      return None
    try:
      saved = json.loads(path.read_text(encoding='utf-8'))
      return {'result': saved['result'], 'seconds': saved['seconds']}
    except (OSError, ValueError, TypeError, KeyError) as e:
      log(f'{path}: cannot be read ({reason(e)}); running this stage again')
      return None

  return hosts.broadcast_json(read() if hosts.is_leader() else None)


def _path(job: Job, stage: Stage) -> pathlib.Path:
  return job.config.path() / 'stages' / f'{stage.name}.json'


def _finish(run: Run, seconds: dict[str, float]) -> dict:
  job, folder = run.job, run.job.config.path()
  report = make_report(run) | {'verify': run.verified}
  report['seconds'] = {k: round(v, 1) for k, v in (seconds | {'load': run.load_seconds}).items()}
  report['peak_bytes'] = about.peak_bytes()  # of this process only, even if it resumed an earlier attempt
  if hosts.is_leader():
    report['bytes'] = bytes_on_disk(job)
    write_reports(job, report, folder)
    write_json(folder / 'report.json', report)
    shutil.rmtree(folder / 'checkpoints', ignore_errors=True)
  hosts.barrier('report')
  return report
