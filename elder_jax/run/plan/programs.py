"""The stages of a run, in its order: the heaviest program of each and what is in memory with it, all with abstract arrays.

Shapes come from jax.eval_shape, their parts per device from sharding.py's table. Who holds which model is pipeline.py's
business and described here; plan.py makes a table of it.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools

from flax import nnx
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from elder_jax.devices import sharding
from elder_jax.hf import verify
from elder_jax.methods import auto
from elder_jax.methods import elder
from elder_jax.methods import importance
from elder_jax.methods import laco as laco_lib
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.model.decoder import Spec
from elder_jax.recipes import absorb
from elder_jax.run import prepare as prepare_lib
from elder_jax.run.config import TRAINED
from elder_jax.run.config import Config
from elder_jax.run.plan.flops import abstract_model
from elder_jax.run.plan.flops import device_bytes
from elder_jax.run.plan.flops import forward_flops
from elder_jax.run.plan.flops import placed
from elder_jax.run.plan.flops import training_flops
from elder_jax.text import perplexity as perplexity_lib
from elder_jax.text import zero_shot
from elder_jax.training import loop
from elder_jax.training import regularize

BY_DEPTH = ('uidl', 'cosine_block')  # methods whose program is another one for another number of layers to remove


def is_trained(config: Config, recipe: str) -> bool:
  return recipe in TRAINED and config.steps() > 0


@dataclasses.dataclass(frozen=True)
class Program:
  """The heaviest jitted call of a stage and what it is called with; arrays are abstract and know their shardings."""

  name: str
  call: Callable | None  # None: nothing is computed that takes more than what is there
  args: tuple
  model_flops: float  # of one call on all devices, by formula: no recomputation
  # Bytes on each device.
  params: int
  opt_state: int = 0
  gradients: int = 0
  beside: int = 0  # models that are not arguments but there
  twice: int = 0  # of the arguments, what is given under two names but there once
  host: bool = False  # not on the devices but in the memory of the first host


@dataclasses.dataclass(frozen=True)
class Given:
  """What the stages of a run follow from, and the abstract arrays that most of them have."""

  config: Config
  spec: Spec
  num_layers: int
  num_removes: list[int]  # the first is that of the exported model
  mesh: Mesh
  source_dtype: str

  @functools.cached_property
  def dense(self) -> Decoder:
    return abstract_model(self.spec, self.num_layers, self.config.dtype, self.mesh, self.config.mesh)

  @functools.cached_property
  def tokens_BT(self):
    return self.batch(self.config.batch_size, self.config.seq_len)

  def batch(self, B: int, T: int, kind: str = 'int32'):
    return jax.ShapeDtypeStruct((B, T), kind, sharding=NamedSharding(self.mesh, sharding.BATCH))

  @property
  def mode(self) -> Mode:
    return prepare_lib.mode(self.config)

  @property
  def scores(self) -> bool:
    return self.config.remove_layers is None and any(self.num_removes)

  @property
  def export_dtype(self) -> str:
    return self.config.export_dtype or self.source_dtype

  def flops(self, num_layers: int, tokens: int, seq_len: int) -> float:
    """Of a forward pass."""
    return tokens * sum(forward_flops(self.spec.with_layers([]), num_layers, seq_len))


def programs(
  config: Config, spec: Spec, num_layers: int, num_removes: list[int], mesh: Mesh, source_dtype: str = 'float32'
) -> list[Program]:
  """The stages of a run of these settings. The mesh must be set (jax.set_mesh), or one device is assumed.

  Args:
    source_dtype: checkpoint_hf.Source.dtype.
  """
  run = Given(config, spec, num_layers, num_removes, mesh, source_dtype)
  if config.recipes() == ['none'] and not (run.scores or config.corpora() or config.task_names()):
    return []  # layers are copied from file to file
  dense = Program('loading', None, (), 0, device_bytes(run.dense))
  found = [dense, *_evaluation(run, run.dense), *_choosing(run), *_recipes(run), *_export(run)]
  heaviest: dict[str, Program] = {}  # what several methods or recipes have is one row
  for program in found:
    before = heaviest.get(program.name, program)
    heaviest[program.name] = max(before, program, key=lambda p: p.params + p.beside)
  return list(heaviest.values())


def _evaluation(run: Given, model: Decoder) -> list[Program]:
  """Perplexity and tasks of a model; no other one is there."""
  config, size, L = run.config, device_bytes(model), model.num_layers
  B, T = config.eval_batch_size, config.eval_seq_len
  name = f'{L} layers' + (', as trained' if _dtypes(model.layers) - _dtypes(run.dense.layers) else '')
  flops, found = run.flops(L, B * T, T), []
  if config.corpora():
    args = model, run.batch(B, T), run.batch(B, T, 'float32'), run.mode
    found.append(Program(f'evaluation, {name}', perplexity_lib.nll, args, flops, size))
  if config.task_names():  # requests as long as a window; longer ones take more
    args = model, run.batch(B, T), run.batch(B, T), run.mode
    found.append(Program(f'zero-shot, {name}', zero_shot.token_scores(), args, flops, size))
  return found


def _dtypes(model) -> set:
  return {a.dtype for a in jax.tree.leaves(model)}


def _choosing(run: Given) -> list[Program]:
  config, dense, L = run.config, run.dense, run.num_layers
  counts = [n for n in run.num_removes if n] if run.scores else []
  wanted = {}  # (method, number of layers) of each program
  for method in config.methods():
    for n in counts:
      for one in auto.methods(L, n) if method == 'auto' else [method]:
        wanted[one, n if one in BY_DEPTH else max(counts)] = None
  size, found = device_bytes(dense), []
  flops = run.flops(L, run.tokens_BT.size, config.seq_len)
  for method, n in wanted:
    name = f'choosing by {method}' + (f', {n} layers' if method in BY_DEPTH and len(counts) > 1 else '')
    if method == 'elder':
      found.append(_gates(run, n))
    elif method == 'laco':
      call, args = laco_lib.program(dense, run.tokens_BT, run.mode)
      layers = device_bytes(dense.layers)
      found.append(Program(name, call, args, 2 * flops, size + layers, twice=size - layers))
    elif (step := importance.program(method, dense, run.tokens_BT, n, run.mode)) is not None:
      call, args, passes = step
      gradients = device_bytes(args[0]) if method == 'taylor' else 0
      found.append(Program(name, call, args, passes * flops, size, gradients=gradients))
  if 'auto' in config.methods() and counts:
    if auto.absorbs(run.spec):
      found.append(_absorbing(run, 'absorb'))
    for n in counts:
      pruned = _cut(dense, n)
      args = pruned, run.tokens_BT, None, run.mode
      found.append(_removing('judging, removing layers', dense, n, keeps=True))
      flops = run.flops(L - n, run.tokens_BT.size, config.seq_len)
      beside = device_bytes(dense.layers)  # all else is shared
      found.append(
        Program(f'judging, {L - n} layers', perplexity_lib.nll, args, flops, device_bytes(pruned), beside=beside)
      )
  return found


def _recipes(run: Given) -> list[Program]:
  config, dense, found = run.config, run.dense, []
  for n, recipe in itertools.product(run.num_removes, config.recipes()):
    kind, trained = recipe.removesuffix('_then_train'), is_trained(config, recipe)
    # A teacher stays, with what is not cut shared by both.
    teacher = device_bytes(dense.layers) if trained and config.distill else 0
    whole = kind == 'regularize' and trained
    if kind in ('absorb', 'replace_linear') and n:
      found.append(_absorbing(run, kind))
    if 'laco' in config.methods() and run.scores and n and (kind == 'none' or recipe == 'prune_then_train'):
      call, args = laco_lib.merge_program(dense)
      layers = device_bytes(dense.layers)  # of the merge before, beside the dense model and this one's result
      found.append(Program('merging layers', call, args, 0, device_bytes(dense), beside=layers))
    if not whole:
      found.append(_removing('removing layers', dense, n, keeps=bool(teacher)))
    if trained:
      found += _training(run, dense if whole else _cut(dense, n), whole)
    if whole:
      found.append(_removing('removing layers, as trained', _result(run, dense), n, keeps=False, beside=teacher))
    result = _result(run, _cut(dense, n)) if trained else _cut(dense, n)
    found += _evaluation(run, result)
  return found


def _cut(model: Decoder, num_remove: int) -> Decoder:
  """The abstract model with so many layers fewer, in the type of the model."""
  left = model.num_layers - num_remove

  def cut(p):
    a = p.get_value()
    stacked = p.get_metadata()['axes'].startswith('L')
    return p.replace(jax.ShapeDtypeStruct((left, *a.shape[1:]), a.dtype, sharding=a.sharding)) if stacked else p

  cut_model = jax.tree.map(cut, model, is_leaf=lambda a: isinstance(a, nnx.Variable))
  cut_model.spec = cut_model.layers.spec = model.spec.with_layers(list(range(left)))
  return cut_model


def _result(run: Given, start: Decoder) -> Decoder:
  """What training from `start` gives."""
  config, dtype = run.config, 'float32'
  if config.lora_rank:
    dtype = lora.merged_dtype(config.dtype, run.export_dtype)
    is_matrix = lambda path, _: path[0].name == 'layers' and path[1].name.startswith('w')
    changed = jax.tree_util.tree_map_with_path(is_matrix, start)
  else:
    changed = loop.mask(start, config.trainable)
  of_type = lambda true, a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding) if true else a
  return jax.tree.map(of_type, changed, start)


def _absorbing(run: Given, kind: str) -> Program:
  dense = run.dense
  call, args = absorb.program(dense, run.tokens_BT, kind, run.mode)
  size, changed = device_bytes(dense), device_bytes(dense.layers.w_down)  # all else is shared with the dense model
  flops = run.flops(run.num_layers, run.tokens_BT.size, run.config.seq_len)
  return Program(kind, call, args, flops, size + changed, twice=size - changed)


def _removing(name: str, model: Decoder, num_remove: int, keeps: bool, beside: int = 0) -> Program:
  """The cut of a model, stack by stack; keeps: the model stays, else each of its stacks goes when it has been cut."""
  call, args = pruning.program(model, model.num_layers - num_remove)
  largest, left = device_bytes(args[0]), 1 - num_remove / model.num_layers
  others = device_bytes(model) - largest
  made = int(left * (device_bytes((model.layers, model.gate_L)) - largest)) if keeps else 0
  return Program(name, call, args, 0, largest, beside=beside + others + made)


def _gates(run: Given, num_remove: int) -> Program:
  config, model = run.config, run.dense
  settings = prepare_lib.gate_settings(config, model.num_layers, num_remove)
  terms = elder.terms(np.ones(model.num_layers, bool), settings.lambda1)
  flops = training_flops(model.spec, model.num_layers, config.seq_len, 'gates')
  begin = lambda model: elder.begin(model, settings, run.mode)
  return _steps(run, 'stage 1, gates', begin, model, None, terms, flops)


def _training(run: Given, start: Decoder, whole: bool) -> list[Program]:
  """Training from `start`; whole: which is the dense model."""
  config, num_layers = run.config, start.num_layers
  settings = prepare_lib.train_settings(config)
  flops = training_flops(run.spec, num_layers, config.seq_len, 'lora' if config.lora_rank else config.trainable)
  if config.distill:
    flops += sum(forward_flops(run.spec, run.num_layers, config.seq_len))
  terms = regularize.penalty_terms(num_layers, [], settings, 0)
  begin = lambda model: regularize.begin(model, settings, run.mode)
  program = _steps(
    run, f'training, {num_layers} layers', begin, start, run.dense if config.distill else None, terms, flops
  )
  state, (frozen, teacher), *_ = program.args
  if config.distill:  # what is frozen and not cut is the teacher's own
    layers = jax.tree.leaves((frozen.layers, frozen.gate_L))
    shared = device_bytes(frozen) - (0 if whole else device_bytes(layers))
    program = dataclasses.replace(program, params=program.params - shared, twice=shared)
  if not config.lora_rank:
    return [program]
  # The largest matrix as if it were the last one: all others are merged, and the optimiser's state is still there.
  call, args = lora.program(loop.combine(state.trained, frozen), lora.merged_dtype(config.dtype, run.export_dtype))
  *_, base, a, b = args
  result = _result(run, start)
  largest = max(device_bytes(p) for p in jax.tree.leaves(result.layers))
  beside = device_bytes(result) - largest + device_bytes(state) - device_bytes((a, b))
  if teacher is not None:  # embedding, head and the like are its own
    beside += device_bytes(teacher.layers)
  return [program, Program('merging LoRA', call, args, 0, device_bytes((base, a, b)), beside=beside)]


def _steps(run: Given, name: str, begin, model: Decoder, teacher, terms, flops: float) -> Program:
  """Steps of training: begin(model) -> (step, state, frozen)."""
  made = []

  def shapes(model):
    step, state, frozen = begin(model)
    made.append(step)
    return state, frozen

  state, frozen = placed(jax.eval_shape(shapes, model), run.mesh)
  parts = 1 if run.config.grad_accum == 1 else 2  # the sum, and the part that is added to it
  return Program(
    name,
    made[0],
    (state, (frozen, teacher), run.tokens_BT, terms),
    flops * run.tokens_BT.size,
    params=device_bytes((state.trained, frozen, teacher)),
    opt_state=device_bytes(state.opt_state),
    gradients=parts * device_bytes(state.trained),
  )


def _export(run: Given) -> list[Program]:
  """What is written, read back and compared; never two models at a time."""
  config = run.config
  start = _cut(run.dense, run.num_removes[0])
  pruned = _result(run, start) if is_trained(config, config.recipe) else start
  length = config.eval_seq_len if config.corpora() else config.seq_len if config.train_data else 32
  call, args = verify.program(pruned, run.export_dtype, T := min(128, length))
  flops = run.flops(pruned.num_layers, T, T)
  found = [
    Program('export', None, (), 0, device_bytes(pruned)),
    Program('verification', call, args, flops, device_bytes(args[0])),
  ]
  if verify.use_torch(config.verify, size := pruning.num_params(pruned), say=lambda _: None):
    found.append(Program('verification in PyTorch', None, (), 0, verify.torch_bytes(size), host=True))
  return found
