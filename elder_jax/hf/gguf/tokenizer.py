"""Converts the tokenizer of a GGUF file to Hugging Face's tokenizer.json and tokenizer_config.json.

A GGUF file holds the vocabulary, the merges or scores, and the name of the pre-tokenizer.
"""

import pathlib
import re

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from elder_jax.errors import InputError
from elder_jax.errors import reason

# Pre-tokenizers of byte-level BPE (tokenizer.ggml.pre), equivalent to the regular expressions in llama.cpp. `smollm`:
# single digits, then GPT-2's pattern; `llama-bpe` and `qwen2`: Llama 3's pattern with three digits or one at a time.
_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(**how):
  return pre_tokenizers.ByteLevel(add_prefix_space=False, **how)


def _split_by(digits):
  return [
    pre_tokenizers.Split(tokenizers.Regex(_PATTERN.replace('DIGITS', digits)), 'isolated'),
    _byte_level(use_regex=False),
  ]


_PRE_TOKENIZERS = {
  'gpt-2': lambda: [_byte_level()],
  'smollm': lambda: [pre_tokenizers.Digits(individual_digits=True), _byte_level()],
  'llama-bpe': lambda: _split_by(r'\p{N}{1,3}'),
  'qwen2': lambda: _split_by(r'\p{N}'),
}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
# Tokens at which llama.cpp always ends a text, even if no field names them.
_ENDS = '<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <EOT> _<EOT>'.split()
_KNOWN = re.compile(
  r'tokenizer\.(chat_template(s|\..*)?|huggingface\.json|ggml\.(model|pre|tokens|token_type|scores|merges|\w+_token_id|'
  r'eos_token_ids|add_(bos|eos|padding|unknown)_token|add_space_prefix))'
)
_OFF = ('tokenizer.ggml.add_sep_token', 'tokenizer.ggml.remove_extra_whitespaces')


def is_known(key: str, value) -> bool:
  """Whether a field of the tokenizer is read here, or does not change the tokens."""
  return bool(_KNOWN.fullmatch(key)) or (key in _OFF and value is False)


def build(fields: dict, path: pathlib.Path) -> tuple[tokenizers.Tokenizer, dict, list[int]]:
  """Builds a tokenizer from the metadata of a GGUF file.

  Args:
    path: of the file, for errors.

  Returns:
    (tokenizer, content of tokenizer_config.json, ids of the tokens that end a text).

  Raises:
    InputError: the kind of tokenizer is not supported, or its vocabulary is damaged.
  """
  kind, dialect = fields.get('tokenizer.ggml.model'), fields.get('tokenizer.ggml.pre', 'default')
  # A list, because the value may not be hashable.
  if not (kind == 'llama' and dialect == 'default') and not (kind == 'gpt2' and dialect in list(_PRE_TOKENIZERS)):
    raise InputError(
      f'{path}: the GGUF tokenizer {kind}/{dialect} is not supported (only llama/default and gpt2 with '
      f'{", ".join(_PRE_TOKENIZERS)}); use the Hugging Face folder of this model.'
    )
  try:
    return _build(fields, kind, dialect)
  except Exception as e:  # tokenizers raises a bare Exception  # noqa: BLE001
    raise InputError(f'{path}: the GGUF vocabulary is invalid ({reason(e)}); use the Hugging Face folder.') from e


def _build(fields: dict, kind: str, dialect: str) -> tuple[tokenizers.Tokenizer, dict, list[int]]:
  tokens, types = (fields[f'tokenizer.ggml.{k}'] for k in ('tokens', 'token_type'))
  tokenizer = _sentencepiece(fields) if kind == 'llama' else _byte_level_bpe(fields, dialect)

  def added(kind):
    return [tokenizers.AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == kind]

  tokenizer.add_special_tokens(added(_CONTROL))
  tokenizer.add_tokens(added(_USER_DEFINED))

  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  for name, key in (('bos', 'bos'), ('eos', 'eos'), ('unk', 'unknown'), ('pad', 'padding')):
    if (token := fields.get(f'tokenizer.ggml.{key}_token_id')) is not None:
      settings[f'{name}_token'] = tokens[token]
  # llama.cpp's defaults: BOS for SentencePiece vocabularies and llama-bpe.
  adds_bos = fields.get('tokenizer.ggml.add_bos_token', kind == 'llama' or dialect == 'llama-bpe')
  adds_eos = fields.get('tokenizer.ggml.add_eos_token', False)
  begin, end = ([settings[name]] if adds else [] for name, adds in (('bos_token', adds_bos), ('eos_token', adds_eos)))
  if begin or end:
    steps = [] if kind == 'llama' else [processors.ByteLevel(trim_offsets=False)]
    around = processors.TemplateProcessing(
      single=[*begin, '$A', *end],
      pair=[*begin, '$A', *end, *begin, '$B', *end],
      special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(begin + end)],
    )
    tokenizer.post_processor = processors.Sequence([*steps, around])
  templates = {'default': fields['tokenizer.chat_template']} if 'tokenizer.chat_template' in fields else {}
  prefix = 'tokenizer.chat_template.'
  templates |= {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
  if len(templates) > 1:
    settings['chat_template'] = [{'name': name, 'template': template} for name, template in templates.items()]
  elif templates:
    settings['chat_template'] = next(iter(templates.values()))
  return tokenizer, settings, _ends(fields)


def _ends(fields: dict) -> list[int]:
  """Ids of the tokens at which llama.cpp ends a text, EOS first."""
  tokens = fields['tokenizer.ggml.tokens']
  ids = [fields.get(f'tokenizer.ggml.{name}_token_id') for name in ('eos', 'eot', 'eom')]
  ids += fields.get('tokenizer.ggml.eos_token_ids', [])
  ids += [i for i, token in enumerate(tokens) if token in _ENDS]
  ids = list(dict.fromkeys(i for i in ids if i is not None))
  if not all(isinstance(i, int) and 0 <= i < len(tokens) for i in ids):
    raise ValueError(f'the end tokens {ids} are not all in the vocabulary')
  return ids


def _byte_level_bpe(fields: dict, dialect: str) -> tokenizers.Tokenizer:
  vocabulary = {t: i for i, t in enumerate(fields['tokenizer.ggml.tokens'])}
  merges = [tuple(merge.split(' ')) for merge in fields['tokenizer.ggml.merges']]
  # llama-bpe keeps a word that is in the vocabulary whole, even if no merges lead to it.
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=dialect == 'llama-bpe'))
  if dialect == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[dialect]())
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(fields: dict) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: merges the neighbours whose merged token has the best score; the rest falls back to bytes."""
  tokens, scores, types = (fields[f'tokenizer.ggml.{k}'] for k in ('tokens', 'scores', 'token_type'))
  vocabulary = {t: i for i, t in enumerate(tokens)}
  whole = {t for t, kind in zip(tokens, types) if kind in (_CONTROL, _USER_DEFINED)}  # never merged
  merges = []
  for i, token in enumerate(tokens):
    if token not in whole:
      halves = [(token[:at], token[at:]) for at in range(1, len(token))]
      merges += [(-scores[i], i, *pair) for pair in halves if all(h in vocabulary and h not in whole for h in pair)]
  # Merges to the same token may be in any order: the tokenizer applies the first that is possible.
  merges.sort(key=lambda merge: merge[:2])
  unknown = tokens[fields.get('tokenizer.ggml.unknown_token_id', 0)]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocabulary, [merge[2:] for merge in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
  )
  space = '\u2581'
  prefix = fields.get('tokenizer.ggml.add_space_prefix', True)
  normalizer, strip = ([normalizers.Prepend(space)], [decoders.Strip(' ', 1, 0)]) if prefix else ([], [])
  tokenizer.normalizer = normalizers.Sequence([*normalizer, normalizers.Replace(' ', space)])
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(space, ' '), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  return tokenizer
