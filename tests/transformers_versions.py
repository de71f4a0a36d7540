"""Checks that exports load in transformers 4.46 and 5: makes an environment per version and compares logits per family.

  python tests/transformers_versions.py FOLDER [VERSION ...]

The environments and models are written to FOLDER. Needs the requirements of the tests and a package registry. A family that
a version does not support yet is reported as such; anything else is a failure. Not part of the test run, as it installs
torch for each version.
"""

import json
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent
VERSIONS = ('4.46.3', '5.23.0')

LOAD = """
import json, pathlib, sys
import numpy as np, torch, transformers
# Config keys that an older version of a supported family may not read.
KEYS = {'gemma2': ['layer_types'], 'phi3': ['partial_rotary_factor'], 'qwen2': ['head_dim', 'layer_types']}
failed = 0
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  config = json.loads((folder / 'export' / 'config.json').read_text())
  kind, version = config['model_type'], transformers.__version__
  if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
    print(f'{folder.name}: {kind} is not known to transformers {version}')
    continue
  plain = transformers.AutoConfig.for_model(kind)
  unknown = [k for k in KEYS.get(kind, ()) if k in config and not hasattr(plain, k)]
  try:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder / 'export', torch_dtype=torch.float32, output_loading_info=True)
  except RuntimeError as e:
    print(f'{folder.name}: {"" if unknown else "FAILS, "}{unknown} not known to {version}; {str(e).splitlines()[0]}')
    failed += not unknown
    continue
  wrong = [k for k, v in info.items() if len(v) and k != 'error_msgs']
  with torch.no_grad():
    got = model.eval()(torch.tensor(np.load(folder / 'tokens.npy'))).logits.numpy()
  expected = np.load(folder / 'logits.npy')
  difference = np.abs(got - expected).max()
  good = not wrong and difference <= 1e-4 * max(1, np.abs(expected).max())
  verdict = 'loads' if good else f'differs, {unknown} not known to {version}' if unknown else 'FAILS'
  print(f'{folder.name}: {verdict}, logits differ by {difference:.1e}', wrong or '')
  failed += not good and not unknown
sys.exit(failed > 0)
"""


def export_all(models: pathlib.Path):
  """Exports every case of families_test without two layers, and saves the logits computed with JAX."""
  sys.path[:0] = [str(TESTS), str(TESTS.parent)]
  import numpy as np

  from elder_jax.hf.load import load_model
  from elder_jax.hf.source import open_source
  from elder_jax.run import pipeline
  from elder_jax.run.config import Config
  from tests.family_cases import CASES
  from tests.hf.families_test import logits
  from tests.hf.families_test import tokens
  from tests.hf.families_test import write_model

  for case in CASES:
    work = models / case.replace(', ', '-').replace(' ', '_')
    if (work / 'logits.npy').exists():
      continue
    source = write_model(models.parent / 'sources' / work.name, case)
    run = models.parent / 'runs' / work.name
    pipeline.run(
      Config.of(model=str(source), workdir=str(run), recipe='none', compare=(), remove_layers=(1, 2), verify='torch')
    )
    work.mkdir(parents=True)
    (run / 'export').rename(work / 'export')
    opened = open_source(str(work / 'export'), work / 'export')
    np.save(work / 'tokens.npy', tokens().astype(np.int64))
    np.save(work / 'logits.npy', np.asarray(logits(load_model(opened, 'float32'), tokens())))


def main():
  folder, versions = pathlib.Path(sys.argv[1]), sys.argv[2:] or VERSIONS
  models = folder / 'models'
  export_all(models)
  (folder / 'load.py').write_text(LOAD)
  outcome = {}
  for version in versions:
    python = folder / version / 'bin' / 'python'
    if not python.exists():
      subprocess.run([sys.executable, '-m', 'venv', str(folder / version)], check=True)
      install = [str(python), '-m', 'pip', 'install', '-q', f'transformers=={version}', 'torch==2.13.0', 'numpy']
      subprocess.run(install, check=True)
    print(f'transformers {version}')
    outcome[version] = subprocess.run([str(python), str(folder / 'load.py'), str(models)], check=False).returncode
  print(json.dumps(outcome))
  sys.exit(max(outcome.values()))


if __name__ == '__main__':
  main()
