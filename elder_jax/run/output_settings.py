"""Settings of what a run writes: the export, and trackers."""

import dataclasses

from elder_jax.errors import InputError
from elder_jax.run.tracking import TRACKERS
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class OutputSettings(Settings):
  """The exported folder, and where the metrics of training go as well."""

  export_dtype: str = setting(
    '', "Type of the exported weights; unset: the model's own.", choices=('', 'float32', 'bfloat16', 'float16')
  )
  shard_gb: float = setting(5.0, 'Largest size of an exported file, in GB (1e9 bytes).', above=0)
  verify: str = setting(
    'auto',
    'Checks of the exported folder: auto, read back in JAX, and in PyTorch where torch and transformers are installed; '
    'jax: JAX only; torch: both, an error if they are missing.',
    choices=('auto', 'jax', 'torch'),
  )
  track: tuple[str, ...] = setting(
    (),
    f'Where the metrics of each step go as well, of {", ".join(TRACKERS)}; several with commas. Files go into the work '
    'folder. May change when a run resumes.',
  )

  def __post_init__(self):
    super().__post_init__()
    if unknown := [name for name in self.track if name not in TRACKERS]:
      raise InputError('track', unknown[0], f'is not known; choose of: {", ".join(TRACKERS)}.')
