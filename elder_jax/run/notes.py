"""Saves the intermediate results of a long search, so that a killed search does not repeat them."""

import collections
import json
import pathlib

from elder_jax.devices import hosts
from elder_jax.errors import reason
from elder_jax.log import log
from elder_jax.log import write_whole


class Notes(collections.UserDict):
  """JSON values by name, the same in all processes. Setting one writes it to disk at once."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self._path = path
    self.data = hosts.broadcast_json(self._read() if hosts.is_leader() else None)

  def _read(self) -> dict:
    if not self._path.exists():
      return {}
    try:
      return dict(json.loads(self._path.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as e:
      log(f'{self._path}: cannot be read ({reason(e)}); computing its values again')
      return {}

  def __setitem__(self, key: str, item):
    super().__setitem__(key, item)
    if hosts.is_leader():
      self._path.parent.mkdir(parents=True, exist_ok=True)
      write_whole(self._path, json.dumps(self.data))
