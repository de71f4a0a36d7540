"""The environment of a run for its report: package versions, devices, peak memory."""

import importlib.metadata
import platform

import jax


def package_versions() -> dict[str, str]:
  packages = ('elder_jax', 'jax', 'jaxlib', 'flax', 'optax', 'transformers', 'datasets', 'numpy')
  found = {'python': platform.python_version()}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an extra, or elder_jax itself where it is run from a checkout
      found[package] = 'not installed'
  return found


def device_name() -> str:
  devices = jax.devices()
  return f'{len(devices)} × {devices[0].device_kind}, {jax.process_count()} process(es)'


def peak_bytes() -> int | None:
  """Peak memory of this process's fullest device so far, in bytes; None if devices do not report it (CPU)."""
  peaks = [(d.memory_stats() or {}).get('peak_bytes_in_use') for d in jax.local_devices()]
  return None if None in peaks else max(peaks)
