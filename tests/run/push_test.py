"""Uploads to a hub on loopback: what is sent, what is refused, and that nothing is sent unasked."""

import base64
import http.server
import json
import pathlib
import shutil
import threading
import urllib.parse

from ending import one_sentence
import huggingface_hub
import pytest
from refusal import refused
from tiny import config_of

from elder_jax.commands import run_verb
from elder_jax.hf import push
from elder_jax.run import pipeline
from elder_jax.run import series
from elder_jax.run.config import Config

TOKEN = 'hf_' + 'secret' * 5


class Hub:
  """Repositories by kind and name, {'private': bool, 'files': {name: content}}; `asked` has each request."""

  def __init__(self):
    self.repositories: dict[tuple[str, str], dict] = {}
    self.asked: list[tuple[str, str]] = []
    self.refusal, hub = None, self  # (method, path, status) of a request that fails

    class Handler(http.server.BaseHTTPRequestHandler):
      def log_message(self, *_):
        pass

      def answer(self):
        path = urllib.parse.unquote(self.path.split('?')[0])
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        hub.asked.append((self.command, path))
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
          status, value = 401, {'error': 'Invalid credentials in Authorization header'}
        elif hub.refusal and self.command == hub.refusal[0] and path.startswith(hub.refusal[1]):
          status, value = hub.refusal[2], {'error': f'no, {TOKEN}'}
        else:
          status, value = hub.answer(self.command, path, body)
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, of_header in (
          ('Content-Type', 'application/json'),
          ('Content-Length', str(len(content))),
          *([('X-Error-Code', 'RepoNotFound')] if status == 404 else []),
          *([('X-Error-Message', value['error'])] if status in (401, 403) else []),
        ):
          self.send_header(name, of_header)
        self.end_headers()
        self.wfile.write(content)

      do_GET = do_POST = answer

    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    self.url = f'http://127.0.0.1:{self.server.server_port}'

  def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict | list]:
    parts = path.strip('/').split('/')
    if path == '/api/repos/create':
      asked = json.loads(body)
      name = f'{asked["organization"]}/{asked["name"]}'
      private = asked.get('visibility') == 'private' or bool(asked.get('private'))
      if ('models', name) in self.repositories:
        return 409, {'error': 'You already created this model repo', 'url': f'{self.url}/{name}'}
      self.repositories['models', name] = {'private': private, 'files': {}}
      return 200, {'url': f'{self.url}/{name}', 'name': name}
    if path == '/api/validate-yaml':
      bad = 'license: [' in json.loads(body)['content']
      return (400, {'errors': [{'message': 'no such licence'}]}) if bad else (200, {'warnings': [], 'errors': []})
    kind, name, what = parts[1], '/'.join(parts[2:4]), parts[4:]
    repository = self.repositories.get((kind, name))
    if repository is None:
      return 404, {'error': 'Repository not found'}
    if not what or what[0] == 'revision':
      about = {'_id': '1', 'id': name, 'sha': 'a' * 40, 'private': repository['private'], 'downloads': 0, 'tags': []}
      return 200, about | {'gated': False, 'siblings': [{'rfilename': f} for f in repository['files']]}
    if what[0] == 'tree':
      return 200, [{'type': 'file', 'path': f, 'size': 1, 'oid': 'a' * 40} for f in repository['files']]
    if what[0] == 'preupload':
      files = json.loads(body)['files']
      return 200, {'files': [{'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False} for f in files]}
    assert (method, what[0]) == ('POST', 'commit'), path
    lines = [json.loads(line) for line in body.splitlines()]
    sent = {
      line['value']['path']: base64.b64decode(line['value']['content']) for line in lines if line['key'] == 'file'
    }
    repository['files'] |= sent
    return 200, {'commitUrl': f'{self.url}/{name}/commit/{"b" * 40}', 'commitOid': 'b' * 40}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
  """Where the hub's client sends its requests, with a token."""
  made = Hub()
  monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', made.url)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))
  monkeypatch.setenv('HF_TOKEN', TOKEN)
  monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
  yield made
  made.server.shutdown()


@pytest.fixture
def cut(tiny, tmp_path) -> dict:
  """Settings of a run that only copies."""
  more = dict(remove_layers='1,4', recipe='none', compare=(), verify='jax')
  return dict(model=str(tiny), workdir=str(tmp_path / 'work')) | more


@pytest.fixture(scope='module')
def original(tiny, tmp_path_factory) -> pathlib.Path:
  work = tmp_path_factory.mktemp('work')
  pipeline.run(
    config_of(model=str(tiny), workdir=str(work), remove_layers='1,4', recipe='none', compare=(), verify='jax')
  )
  return work / 'export'


@pytest.fixture
def export(original, tmp_path) -> pathlib.Path:
  return shutil.copytree(original, tmp_path / 'export')


def uploaded(capsys, *args) -> str:
  run_verb('push', [str(arg) for arg in args])
  out, err = capsys.readouterr()
  assert TOKEN not in out + err
  return out


def failed(capsys, status: int, *parts, args):
  with pytest.raises(SystemExit) as end:
    run_verb('push', [str(arg) for arg in args])
  out, err = capsys.readouterr()
  assert TOKEN not in out + err
  lines = [line for line in err.splitlines() if line.startswith('elder_jax: ')]
  one_sentence((end.value.code, out, lines[-1] + '\n'), status, *parts)


def test_an_export_is_uploaded_in_one_commit(export, hub, capsys):
  (export / 'README.md').write_text('---\nlicense: mit\n---\nMine.\n')  # edited
  (export / 'notes.txt').write_text('of no concern to the hub')
  out = uploaded(capsys, export, '--to=me/small', '--private')
  assert out == f'{export}: uploaded to {hub.url}/me/small\n'
  repository = hub.repositories['models', 'me/small']
  expected = {p.relative_to(export).as_posix(): p.read_bytes() for p in export.rglob('*') if p.is_file()}
  del expected['notes.txt']
  assert repository == {'private': True, 'files': expected}
  assert sum('/commit/' in path for _, path in hub.asked) == 1
  # Again: the same files, and the repository may be public unless --private is given.
  repository['private'] = False
  uploaded(capsys, export, '--to=me/small')
  failed(capsys, 2, '--to=me/small: exists and is public', args=[export, '--to=me/small', '--private'])


def test_a_new_repository_has_the_visibility_of_the_hub(export, hub, capsys):
  uploaded(capsys, export, '--to=me/small')
  assert not hub.repositories['models', 'me/small']['private']


@pytest.mark.parametrize(
  'args, parts',
  [
    (['{export}'], ['--to=: is missing']),
    (['{export}', '--to=small'], ['--to=small: is no name on the hub', 'USER/NAME']),
    (['{export}', '--to=me/a b'], ['--to=me/a b: is no name on the hub']),
    (['{export}', '--to=me/a/b'], ['is no name on the hub']),
    (['{tmp}', '--to=me/small'], ['has no readable SHA256SUMS', 'exported by elder_jax']),
    (['{tmp}/absent', '--to=me/small'], ['there is no such folder']),
    (['{export}', '--to=me/data'], ['--to=me/data: is the name of a dataset']),
    (['{export}', '--to=me/other'], ['--to=me/other: holds model-00001-of-00002.safetensors', 'remove it']),
  ],
)
def test_bad_input(export, hub, capsys, tmp_path, args, parts):
  hub.repositories = {
    ('datasets', 'me/data'): {'private': False, 'files': {}},
    ('models', 'me/other'): {'private': False, 'files': dict.fromkeys(['a.txt', 'model-00001-of-00002.safetensors'])},
  }
  failed(capsys, 2, *parts, args=[arg.format(export=export, tmp=tmp_path) for arg in args])
  assert not any(method == 'POST' for method, _ in hub.asked)


def test_a_damaged_export_is_not_sent(export, hub, capsys):
  (export / 'config.json').write_text('{}')
  failed(capsys, 2, 'config.json: is not what was written', args=[export, '--to=me/small'])
  assert not hub.asked


def test_without_a_token_nothing_is_asked(export, hub, capsys, monkeypatch):
  monkeypatch.delenv('HF_TOKEN')
  failed(capsys, 2, '--to=me/small: needs a token', 'hf auth login', args=[export, '--to=me/small'])
  assert not hub.asked


@pytest.mark.parametrize(
  'refusal, part',
  [
    (('POST', '/api/repos/create', 403), 'the token may not write to me'),
    (('POST', '/api/models/me/small/commit', 403), 'the token may not write to me'),
    (('GET', '/api/models', 401), 'does not accept the token'),
    (('POST', '/api/repos/create', 418), 'the hub answered'),
  ],
)
def test_what_the_hub_refuses(export, hub, capsys, refusal, part):
  hub.refusal = refusal
  failed(capsys, 1, 'was not uploaded to me/small', part, args=[export, '--to=me/small'])


def test_metadata_that_the_hub_refuses(export, hub, capsys):
  (export / 'README.md').write_text('---\nlicense: [\n---\n')
  failed(capsys, 1, 'Invalid metadata in README.md', 'no such licence', args=[export, '--to=me/small'])


def test_no_network(export, hub, capsys, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
  failed(capsys, 1, 'the upload failed', 'check the network', args=[export, '--to=me/small'])


# ---- of a run ----


def test_a_run_uploads_its_export_when_it_is_done(cut, hub, capsys):
  report = series.run(config_of(**cut, push_to_hub='me/small'))
  work = pathlib.Path(cut['workdir'])
  repository = hub.repositories['models', 'me/small']
  assert repository['private'] and repository['files']['README.md'] == (work / 'export' / 'README.md').read_bytes()
  assert TOKEN not in capsys.readouterr().err
  # What failed is tried again, here under another name; a config.json sends nothing by itself.
  assert series.run(config_of(**cut, push_to_hub='me/again')) == report
  assert ('models', 'me/again') in hub.repositories
  config = Config.of_json((work / 'config.json').read_text())
  assert config.output.push_to_hub == '' and config == config_of(**cut)


def test_a_run_without_a_token_is_refused_at_its_start(settings, hub, monkeypatch, no_long_work, no_text):
  monkeypatch.delenv('HF_TOKEN')
  monkeypatch.setattr('refusal.pipeline.run', series.run)
  refused(settings, '--push_to_hub=me/small: needs a token', push_to_hub='me/small')
  monkeypatch.setenv('HF_TOKEN', TOKEN)
  refused(settings, '--push_to_hub=small: is no name', push_to_hub='small')
  assert not hub.asked


def test_a_run_whose_upload_fails_keeps_its_export(cut, hub):
  hub.refusal = ('POST', '/api/repos/create', 403)
  work = pathlib.Path(cut['workdir'])
  with pytest.raises(push.PushFailed) as failure:
    series.run(config_of(**cut, push_to_hub='me/small'))
  sentence = str(failure.value)
  assert sentence.startswith(
    f'the export {work}/export is complete, but was not uploaded to me/small: the token may not'
  )
  assert sentence.endswith(f'elder_jax push {work}/export --to=me/small') and TOKEN not in sentence
  assert (work / 'report.json').is_file() and (work / 'export' / 'SHA256SUMS').is_file()
  assert not (work / 'failed.txt').exists()
