"""The environment of a run for its report: package versions, devices, peak memory."""

import importlib.metadata
import pathlib
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


def fast_dtype(device=None) -> str:
  """Returns bfloat16 if a device has instructions for its matrix products, else float32.

  Args:
    device: None: the first one here. Of other CPUs than x86 with Linux nothing is known: float32.
  """
  device = jax.devices()[0] if device is None else device
  if device.platform == 'gpu':
    return 'bfloat16' if float(device.compute_capability) >= 8 else 'float32'
  if device.platform != 'cpu':
    return 'bfloat16'
  try:
    return 'bfloat16' if 'amx_bf16' in pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8') else 'float32'
  except OSError:
    return 'float32'


def peak_bytes() -> int | None:
  """Peak memory of this process's fullest device so far, in bytes; None if devices do not report it (CPU)."""
  peaks = [(d.memory_stats() or {}).get('peak_bytes_in_use') for d in jax.local_devices()]
  return None if None in peaks else max(peaks)
