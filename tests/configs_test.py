"""The flag files: each is read by the command's own parser and passes the checks that need no model."""

import pathlib

from absl import flags
import pytest

from elder_jax import config as config_lib

FOLDER = pathlib.Path(__file__).parent.parent / 'configs'


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.flags')), ids=lambda path: path.name)
def test_flag_file(path):
  values = flags.FlagValues()
  config_lib.define_flags(values)
  values(['main', f'--flagfile={path}'])
  config = config_lib.from_flags(values)
  config.check()
  assert config.train_data and config.corpora() and pathlib.Path(config.workdir).name == path.stem
  is_paper = (config.method, config.recipe, config.gate, config.order) == ('elder', 'regularize', 'output', 'joint')
  assert is_paper == path.name.startswith('paper_')
  assert path.read_text().startswith(f'# python -m elder_jax.main --flagfile=configs/{path.name}')
