"""A hub on localhost: which files of a repository are fetched, from which commit, and the errors if they cannot be."""

import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
from tiny import write_tiny_llama

FIRST, SECOND = 'a' * 40, 'b' * 40  # commits

pytestmark = pytest.mark.slow  # each test starts a process


class Hub:
  """Serves the folder as repository own/tiny. Each request for its head commit returns the next of `heads`."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.heads, self.requests, hub = folder, [FIRST], [], self

    class Handler(http.server.BaseHTTPRequestHandler):
      def log_message(self, *_):
        pass

      def do_GET(self):
        path = urllib.parse.unquote(self.path.split('?')[0])
        hub.requests.append(path)
        status, headers, content = hub.answer(path)
        self.send_response(status)
        for name, value in (headers | {'Content-Length': str(len(content))}).items():
          self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
          self.wfile.write(content)

      do_HEAD = do_GET

    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    self.url = f'http://127.0.0.1:{self.server.server_port}'

  def answer(self, path: str) -> tuple[int, dict, bytes]:
    files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob('*') if p.is_file()}
    if path.startswith('/api/models/own/gated'):
      return 403, {'X-Error-Code': 'GatedRepo'}, b''
    if not path.startswith(('/api/models/own/tiny', '/own/tiny')):
      return 404, {'X-Error-Code': 'RepoNotFound'}, b''
    if '/tree/' in path:

      def blob(p):
        return hashlib.sha1(p.read_bytes()).hexdigest()

      tree = [{'type': 'file', 'path': f, 'size': p.stat().st_size, 'oid': blob(p)} for f, p in files.items()]
      return 200, {'Content-Type': 'application/json'}, json.dumps(tree).encode()
    if path.startswith('/api/'):
      sha = self.heads.pop(0) if len(self.heads) > 1 else self.heads[0]
      about = {'_id': '1', 'id': 'own/tiny', 'sha': sha, 'private': False, 'gated': False, 'downloads': 0, 'tags': []}
      about |= {'siblings': [{'rfilename': f} for f in files]}
      return 200, {'Content-Type': 'application/json'}, json.dumps(about).encode()
    commit, _, name = path.partition('/resolve/')[2].partition('/')
    if name not in files:
      return 404, {'X-Error-Code': 'EntryNotFound'}, b''
    content = files[name].read_bytes()
    return 200, {'ETag': f'"{hashlib.sha256(content).hexdigest()}"', 'X-Repo-Commit': commit}, content


def python(code: str, hub: str, home: pathlib.Path, **env) -> subprocess.CompletedProcess:
  """Runs code in its own process, because the hub's client reads its settings only when it is imported."""
  env = {'HF_ENDPOINT': hub, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_OFFLINE': '0'} | env
  return subprocess.run([sys.executable, '-c', code], env=os.environ | env, capture_output=True, text=True)


def find(hub: str, home: pathlib.Path, name='own/tiny', what='model', **env) -> pathlib.Path:
  code = f'from elder_jax.hf import folder as model_folder; print(model_folder.find("model", {name!r}, {what!r}))'
  result = python(code, hub, home, **env)
  assert result.returncode == 0, result.stderr
  return pathlib.Path(result.stdout.splitlines()[-1])


def names(folder: pathlib.Path) -> set[str]:
  return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module', params=['5GB', '20KB'], ids=['one file', 'shards'])
def repository(request, tmp_path_factory) -> tuple[pathlib.Path, set[str]]:
  """A repository with several copies of the weights, and the names of the files to fetch."""
  folder = write_tiny_llama(tmp_path_factory.mktemp('repository'), shard=request.param)
  (folder / 'additional_chat_templates').mkdir()
  (folder / 'additional_chat_templates' / 'tool_use.jinja').write_text('{{ messages }}')
  wanted = names(folder)
  one = next(folder.glob('*.safetensors'))
  more = ['consolidated.safetensors', 'model.fp32.safetensors', 'original/model.safetensors', 'pytorch_model.bin']
  more += ['model-Q8_0.gguf', 'onnx/model.onnx', 'original/params.json', 'picture.png', 'consolidated.00.pth']
  more += ['model.safetensors'] if request.param == '20KB' else []  # ignored in favour of the index
  for name in more:
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(one, folder / name)
  return folder, wanted


def test_only_the_weights_that_are_read_are_fetched(repository, tmp_path):
  folder, wanted = repository
  hub = Hub(folder)
  hub.heads = [FIRST, SECOND]  # a push while files are fetched
  fetched = find(hub.url, tmp_path)
  assert names(fetched) == wanted
  for name in wanted:
    assert (fetched / name).read_bytes() == (folder / name).read_bytes()
  commits = {path.partition('/resolve/')[2].partition('/')[0] for path in hub.requests if '/resolve/' in path}
  assert commits == {FIRST} == {fetched.name}
  # Offline, the same folder comes from the cache.
  hub.server.shutdown()
  assert find(hub.url, tmp_path, HF_HUB_OFFLINE='1') == fetched


def test_a_tokenizer_is_fetched_without_weights_and_for_a_plan_only_the_config(repository, tmp_path):
  folder, wanted = repository
  hub = Hub(folder)
  fetched = names(find(hub.url, tmp_path / 'a', what='tokenizer'))
  assert fetched == {name for name in wanted if not name.endswith('.safetensors')}
  assert names(find(hub.url, tmp_path / 'b', what='config')) == {'config.json'}


LOADS = """
from elder_jax.text import data
from elder_jax.hf.source import read_config
from elder_jax.errors import InputError
for attempt in (lambda: data.load_tokenizer('own/none'), lambda: read_config('own/gated'),
                lambda: read_config('own/none')):
  try:
    attempt()
  except InputError as e:
    print(e.for_command())
"""


def test_a_repository_that_cannot_be_fetched_is_reported_once(tiny, tmp_path):
  result = python(LOADS, Hub(tiny).url, tmp_path)
  lines = result.stdout.splitlines()
  assert len(lines) == 3, result.stderr
  assert lines[0].startswith('--tokenizer=own/none: no such folder here, and no such repository on the hub')
  assert lines[1].startswith('--model=own/gated: is gated on the hub; accept its terms')
  assert lines[2].startswith('--model=own/none: no such folder here, and no such repository on the hub')


def test_a_hub_that_cannot_be_reached_is_not_retried(tmp_path):
  """transformers alone retries ten times, which takes 26 s or more, and logs every attempt."""
  begin = time.monotonic()
  result = python(LOADS, 'http://127.0.0.1:9', tmp_path)
  assert time.monotonic() - begin < 20
  assert len(result.stdout.splitlines()) == 3 and 'etrying' not in result.stdout + result.stderr
  assert all('fetching it from the hub failed (Got: ConnectError' in line for line in result.stdout.splitlines()), (
    result.stdout
  )


def test_a_repository_without_a_config_is_reported(tiny, tmp_path):
  folder = tmp_path / 'repository'
  folder.mkdir()
  shutil.copy(tiny / 'model.safetensors', folder / 'model-Q8_0.gguf')
  for call in ('source.read_config("own/tiny")', 'folder.find("model", "own/tiny")'):
    code = f'from elder_jax.hf import source, folder\n{call}'
    result = python(code, Hub(folder).url, tmp_path / 'home')
    assert 'InputError: model=own/tiny: the folder has no config.json' in result.stderr, result.stderr
