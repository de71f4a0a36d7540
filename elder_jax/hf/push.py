"""Uploads an exported folder to the hub. The token comes from `hf auth login` or HF_TOKEN, and is never printed."""

import glob
import pathlib
import re

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.hf import manifest

# Files that a loader would prefer to, or mix with, the ones that are uploaded.
_WEIGHTS = re.compile(r'[^/]+\.(safetensors|bin|gguf)(\.index\.json)?')


class PushFailed(Exception):
  """The upload failed. The message says why, without a full stop."""


def check(setting: str, to: str) -> str:
  """Returns the token. Raises InputError for a name that is no USER/NAME, or where no token is set. No network is used."""
  import huggingface_hub  # here, since a local run needs no hub

  try:
    if to.count('/') != 1:
      raise ValueError('it has no owner')
    huggingface_hub.utils.validate_repo_id(to)
  except ValueError as e:  # HFValidationError is one
    raise InputError(setting, to, f'is no name on the hub ({reason(e)}); give USER/NAME.') from e
  try:
    token = huggingface_hub.get_token()
  except Exception as e:  # one that expired is refreshed first, which may fail in many ways  # noqa: BLE001
    raise InputError(setting, to, f'the token of the hub cannot be used ({reason(e)}); run hf auth login.') from e
  if not token:
    raise InputError(setting, to, 'needs a token of the hub; run hf auth login, or set HF_TOKEN.')
  return token


def push(folder: pathlib.Path, to: str, private: bool, setting: str = 'to') -> str:
  """Uploads the files that SHA256SUMS lists, the list and the model card, in one commit. Returns the address.

  Args:
    folder: an export; its files are compared with SHA256SUMS first.
    to: USER/NAME; the repository is made if it does not exist.
    private: whether it must be private. Without it a new repository has the visibility that the hub gives by default.

  Raises:
    InputError: the folder is no unchanged export, no token is set, or the repository cannot be used.
    PushFailed: the hub cannot be reached, or refuses.
  """
  token = check(setting, to)
  manifest.check(folder)
  files = [*manifest.entries(folder), manifest.NAME]
  files += [manifest.CARD] if (folder / manifest.CARD).is_file() and manifest.CARD not in files else []
  try:
    return _upload(folder, to, private, setting, files, token)
  except InputError:
    raise
  except Exception as e:  # the hub client raises many kinds  # noqa: BLE001
    raise PushFailed(_why(e, to).replace(token, '…')) from e


def _upload(folder: pathlib.Path, to: str, private: bool, setting: str, files: list[str], token: str) -> str:
  import huggingface_hub

  api = huggingface_hub.HfApi(token=token, library_name='elder_jax')
  if api.repo_exists(to):
    if private and not api.repo_info(to).private:
      raise InputError(setting, to, 'exists and is public; choose another name, or upload it without --private.')
    left = [name for name in api.list_repo_files(to) if _WEIGHTS.fullmatch(name) and name not in files]
    if left:
      raise InputError(
        setting, to, f'holds {left[0]}, which is not of this export; remove it on the hub, or choose another name.'
      )
  elif other := next((kind for kind in ('dataset', 'space') if api.repo_exists(to, repo_type=kind)), None):
    raise InputError(setting, to, f'is the name of a {other}; choose another name for the model.')
  url = api.create_repo(to, private=private or None, exist_ok=True)
  patterns = [glob.escape(name) for name in files]
  api.upload_folder(
    repo_id=to, folder_path=folder, allow_patterns=patterns, commit_message='Upload an export of elder_jax'
  )
  return str(url)


def _why(error: Exception, to: str) -> str:
  import huggingface_hub.errors as hub

  owner = to.partition('/')[0]
  if isinstance(error, hub.OfflineModeIsEnabled):
    return 'HF_HUB_OFFLINE is set; unset it'
  status = getattr(getattr(error, 'response', None), 'status_code', None)
  if status == 401:
    return 'the hub does not accept the token; run hf auth login again, or set another HF_TOKEN'
  if status == 403:
    return f'the token may not write to {owner}; use one with write access, or another USER'
  if status is not None:
    return f'the hub answered {reason(error)}'
  if isinstance(error, ValueError):  # the metadata of an edited card
    return reason(error)
  return f'the upload failed ({reason(error)}); check the network and HF_ENDPOINT'
