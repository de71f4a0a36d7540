"""Streams data sets of the Hugging Face hub row by row."""

from collections.abc import Iterator
import os
import re

from elder_jax import extras
from elder_jax.errors import InputError
from elder_jax.errors import reason


class Hub:
  """A hub data set, streamed."""

  def __init__(self, flag: str, source: str):
    self._flag, self._source = flag, source
    self._id, self._configuration, self._split = check_hub_id(flag, source)
    self._pinned = ''

  @property
  def revision(self) -> str:
    """The commit that is read; resolved once, so that a run reads one version. Raises InputError if that fails."""
    import huggingface_hub

    if not self._pinned:
      try:
        self._pinned = huggingface_hub.HfApi().dataset_info(self._id).sha
      except Exception as e:  # the client raises many types  # noqa: BLE001
        self._refuse(e)
    return self._pinned

  def rows(self, skip: int) -> Iterator[dict]:
    """Streams the rows after the first `skip`. Raises InputError if the data set cannot be read."""
    import datasets

    datasets.disable_progress_bars()
    name, revision = self._configuration or None, self.revision
    try:
      rows = datasets.load_dataset(self._id, name, split=self._split, streaming=True, revision=revision)
      yield from rows.skip(skip) if skip else rows
    except Exception as e:  # datasets raises many types; the data set cannot be read in any case  # noqa: BLE001
      self._refuse(e)

  def _refuse(self, error: Exception):
    raise InputError(
      self._flag, self._source, f'cannot be read ({reason(error)}); give a .txt, .jsonl or .parquet file or a hub id.'
    ) from error


# Names of splits. Any other single name after an id is a configuration.
_SPLITS = re.compile(r'(train|training|validation|valid|val|dev|test|all)\b.*')


def check_hub_id(flag: str, source: str) -> tuple[str, str, str]:
  """Parses id, id:split, id:configuration or id:configuration:split into (id, configuration or '', split).

  Raises:
    InputError: `source` is not a hub id, or the package that reads hub data sets is missing.
  """
  hub_id, *rest = re.split(r':(?![^\[]*\])', source, maxsplit=2)  # not at the colon in a split such as train[:10%]
  # `datasets` reads any other name as a URL, a pattern, a local folder, or one of its readers of the current folder.
  is_id = re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', hub_id) and not os.path.exists(hub_id)
  if not is_id or _is_reader(flag, source, hub_id):
    raise InputError(
      flag,
      source,
      'is neither a local file or folder nor the id of a hub data set; give a .txt, .jsonl or .parquet file, a '
      'folder of them, or a hub id as owner/name.',
    )
  if len(rest) == 2:
    return hub_id, rest[0], rest[1]
  if rest and not _SPLITS.fullmatch(rest[0]):
    return hub_id, rest[0], 'train'
  return hub_id, '', rest[0] if rest else 'train'


def _is_reader(flag: str, source: str, hub_id: str) -> bool:
  """Whether `datasets` takes this for one of its own readers."""
  extras.require('datasets', 'a hub data set', flag, source)
  from datasets import packaged_modules  # here: it is slow to import

  return hub_id in packaged_modules._PACKAGED_DATASETS_MODULES
