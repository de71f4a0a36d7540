"""Checks that llama.cpp reads our GGUF files: greedy continuations of the same prompts in llama.cpp and in JAX.

  pip install xllamacpp          (wheels of llama.cpp)
  python -m benchmarks.llama_cpp FILE.gguf… [--remove=7,9]

Removes layers from each file in two ways. GGUF to GGUF keeps the file's own types; llama.cpp must load the result. A
folder and export-gguf give float32; both must then generate the same text. (With quantised types, llama.cpp also
quantises activations, so the texts diverge where two tokens are about equally probable.)
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app
from absl import flags

_REMOVE = flags.DEFINE_string('remove', '7,9', 'Layers to remove, 0-based.')

PROMPTS = ('The capital of France is', 'Photosynthesis is the process by which', 'The history of the city of London')
TOKENS = 16
# Runs in its own process, because llama.cpp always writes to stderr.
_SCRIPT = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = sys.argv[1], 512, 0, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
for prompt in sys.argv[3:]:
  asked = dict(prompt=prompt, max_tokens=int(sys.argv[2]), temperature=0, top_k=1, repeat_penalty=1.0, cache_prompt=False)
  print(json.dumps(server.handle_completions(asked)['choices'][0]['text']))
"""


def elder_jax(*args: str) -> str:
  done = subprocess.run([sys.executable, '-m', 'elder_jax', *args], capture_output=True, text=True)
  if done.returncode:
    sys.exit(f'elder_jax {" ".join(args)}\n{done.stderr}')
  return done.stdout


def in_llama_cpp(path: pathlib.Path) -> list[str]:
  """The continuation of each prompt. Exits if llama.cpp cannot load the file."""
  command = [sys.executable, '-c', _SCRIPT, str(path), str(TOKENS), *PROMPTS]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f'llama.cpp: {path}\n{done.stderr[-2000:]}')
  return [json.loads(line) for line in done.stdout.splitlines()]


def in_jax(path: pathlib.Path) -> list[str]:
  limit = f'--max_new_tokens={TOKENS}'
  return [elder_jax('generate', f'--model={path}', f'--prompt={prompt}', limit) for prompt in PROMPTS]


def alike(a: str, b: str) -> bool:
  return a.strip() == b.strip()


def main(argv: list[str]):
  for name in argv[1:]:
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch)
      cut = f'--model={name}', '--recipe=none', '--compare=', f'--remove_layers={_REMOVE.value}'
      elder_jax('prune', *cut, f'--workdir={folder / "gguf"}', '--export_format=gguf')
      [own] = (folder / 'gguf' / 'export').glob('*.gguf')
      in_llama_cpp(own)
      elder_jax('prune', *cut, f'--workdir={folder / "hf"}', '--export_dtype=float32', '--verify=jax')
      plain = folder / 'float32.gguf'
      elder_jax('export-gguf', str(folder / 'hf' / 'export'), f'--like={name}', f'--out={plain}', '--type=f32')
      pairs = list(zip(in_llama_cpp(plain), in_jax(plain)))
      same = sum(alike(a, b) for a, b in pairs)
      print(
        f'{pathlib.Path(name).name}: loaded in its own types; float32: {same} of {len(pairs)} texts are the same',
        flush=True,
      )
      for a, b in pairs:
        if not alike(a, b):
          print(f'  llama.cpp: {a!r}\n  JAX:       {b!r}', flush=True)


if __name__ == '__main__':
  app.run(main)
