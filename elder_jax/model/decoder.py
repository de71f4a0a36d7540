"""The decoder: stacked layers under one scan, a gate per layer.

Dimensions, as used in the names' suffixes:
  B batch, T token, L layer, D model width, N query heads, K key/value heads, G query heads per key/value head,
  H head width, F feed-forward width, V vocabulary.

The modules are Flax NNX modules used as typed pytrees: every function here is pure, and goes under jax.jit, jax.grad
and jax.lax.scan as it stands.
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from elder_jax.devices import sharding
from elder_jax.model.attention import kinds
from elder_jax.model.attention import mixer_of
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.attention import softcap
from elder_jax.model.layers import Block
from elder_jax.model.layers import Norm
from elder_jax.model.layers import weight_maker
from elder_jax.model.layers import whole
from elder_jax.model.layers import wide
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec


class Decoder(nnx.Module):
  """A decoder-only transformer. `gate_L` (fp32) holds one gate per layer; at 1 the network is the ungated one."""

  def __init__(self, spec: Spec, num_layers: int, key: jax.Array):
    assert {len(of_L) for of_L in (spec.rope_L, spec.window_L, spec.mixer_L)} <= {0, num_layers}
    weight = weight_maker(spec, num_layers, key)
    self.spec = spec
    self.embed = weight('VD', 'D')
    self.positions = weight('PD', 'D') if spec.num_positions else None
    self.layers = Block(spec, weight)
    self.gate_L = nnx.Param(jnp.ones(num_layers, jnp.float32), axes='L')
    self.final_norm = Norm(spec, weight, 'D') if spec.final_norm else None
    self.head = None if spec.tied else weight('VD', 'D')
    self.head_bias = weight('V', 0.0) if spec.head_bias else None

  @property
  def num_layers(self) -> int:
    return self.gate_L.get_value().shape[0]


def forward(model: Decoder, tokens_BT, alive_L=None, mode: Mode = Mode(), gate_L=None, measure: Callable | None = None):
  """Runs the network up to the final norm.

  Args:
    tokens_BT: int32 token ids.
    alive_L: bool; a layer that is not alive is skipped: the identity, at no cost. None: all are alive.
    mode: see Mode.
    gate_L: gates (fp32) in place of the model's own.
    measure: (a layer's update d_BTD, what the layer read x_BTD) -> an fp32 scalar. None: nothing is measured.

  Returns:
    x_BTD in the compute type, to be given to `logits_of` or to losses.next_token_nll, and delta_L (fp32), the `measure`
    of each layer; 0 for a skipped layer, and where nothing is measured.
  """
  x_BTD, delta_L = run_layers(model, embed(model, tokens_BT, mode), alive_L, mode, gate_L, measure=measure)
  return final_norm(model, x_BTD), delta_L


def embed(model: Decoder, tokens_BT, mode: Mode = Mode(), position_T=None, batch_axis: int = 0):
  """The stream x_BTD that the first layer reads.

  Args:
    position_T: the tokens' positions; 0 … T − 1 where it is not given.
    batch_axis: that of tokens_BT which lies over the devices.
  """
  spec = model.spec

  # Devices that share the width look up their part of it for each other's tokens, and exchange that: the table stays.
  def over(axis, *width):
    return (*(axis if i == batch_axis else None for i in range(2)), *width)

  tokens_BT = sharding.constrain(tokens_BT, *over('data'))
  x_BTD = jnp.take(model.embed[...], tokens_BT, axis=0).astype(mode.dtype)
  x_BTD = sharding.constrain_batch(sharding.constrain(x_BTD, *over('data', 'fsdp')), batch_axis)
  if spec.embed_scale != 1:
    x_BTD = x_BTD * jnp.asarray(spec.embed_scale, mode.dtype)
  if spec.num_positions:
    position_T = jnp.arange(tokens_BT.shape[1]) if position_T is None else position_T
    # Padding may lie beyond the table. Without clip it would read NaN, and attention to it of weight 0 is NaN as well.
    p_TD = jnp.take(whole(model.positions), position_T + spec.position_offset, axis=0, mode='clip')
    x_BTD = x_BTD + p_TD[None].astype(mode.dtype)
  return x_BTD


def final_norm(model: Decoder, x_BTD):
  """The final norm."""
  return x_BTD if model.final_norm is None else model.final_norm(x_BTD)


def run_layers(
  model: Decoder,
  x_BTD,
  alive_L=None,
  mode: Mode = Mode(),
  gate_L=None,
  inputs: bool = False,
  measure: Callable | None = None,
  compare: tuple[Callable, jax.Array] | None = None,
):
  """The layers alone, from the stream x_BTD at position 0 on; arguments as in `forward`.

  To run only the layers above some layer, give that layer's input and an alive_L that is False below.

  Args:
    inputs: what each layer reads is returned, too.
    compare: (f, y_LBTD): f(what a layer reads x_BTD, its y_BTD), an fp32 scalar, is returned, too; not with `inputs`.

  Returns:
    (x_BTD after the last layer, before the final norm; delta_L), and then x_LBTD of `inputs` or f's results of `compare`.
  """
  if alive_L is None:
    # Behind a barrier, else the compiler drops the branch below, fuses otherwise, and some last bits differ.
    alive_L = jax.lax.optimization_barrier(jnp.ones(model.num_layers, bool))
  gate_L = model.gate_L[...] if gate_L is None else gate_L
  tables = rope_tables(model.spec, x_BTD.shape[1])

  def layer(x_BTD, scanned):
    block, gate, alive, kind, *beside = scanned

    def run(x_BTD):
      rope, window = rope_and_window(model.spec, tables, kind)
      y_BTD, d_BTD = block(x_BTD, gate, rope, mode, window, mixer_of(model.spec, kind))
      return y_BTD, measure(d_BTD, x_BTD) if measure else jnp.float32(0)

    if mode.remat == 'full':
      # Inside the branch as well: else the backward pass computes the layer again in one branch and takes what it needs,
      # the scores of attention among it, through memory into another.
      run = jax.checkpoint(run)
    y_BTD, delta = jax.lax.cond(alive, run, lambda x_BTD: (x_BTD, jnp.float32(0)), x_BTD)
    if compare:
      return sharding.constrain_batch(y_BTD), (delta, compare[0](x_BTD, *beside))
    return sharding.constrain_batch(y_BTD), (delta, x_BTD) if inputs else delta

  if mode.remat == 'full':
    layer = jax.checkpoint(layer)
  elif mode.remat == 'dots':
    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.checkpoint_dots)
  elif mode.remat == 'dots_no_batch':
    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
  elif sharding.batch_ways() > 1:
    layer = jax.checkpoint(layer, policy=_all_but_weights)
  scanned = model.layers, gate_L, alive_L, kinds(model.spec), *(compare[1:] if compare else ())
  x_BTD, out = jax.lax.scan(layer, sharding.constrain_batch(x_BTD), scanned)
  return (x_BTD, *out) if inputs or compare else (x_BTD, out)


def _all_but_weights(primitive, *_, **params) -> bool:
  """Remat policy: what a layer computes is kept, weights that it cast and gathered are not, else all are whole at once."""
  return primitive.name not in ('convert_element_type', 'sharding_constraint', 'custom_vjp_call')  # sharding.gather's


def head_of(model: Decoder):
  """The output head (weights_VD, float32 bias_V or None), gathered for `logits`: once, where that is called in a loop."""
  weights_VD = whole(model.embed if model.head is None else model.head)
  return weights_VD, None if model.head_bias is None else whole(model.head_bias, jnp.float32)


def logits_of(model: Decoder, x_BTD, gathered=None):
  """float32 logits_BTV of `forward`'s hidden states. For a loss use losses.next_token_nll, which never holds them all."""
  return project(head_of(model) if gathered is None else gathered, x_BTD, model.spec.outputs())


def project(gathered, x_BTD, outputs: tuple[float, float | None]):
  """`logits`, by the head as `head` gives it and Spec.outputs of its model."""
  scale, cap = outputs
  weights_VD, bias_V = gathered
  out_BTV = jnp.einsum('BTD,VD->BTV', x_BTD, weights_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
  out_BTV = out_BTV if bias_V is None else out_BTV + wide(bias_V, out_BTV)
  return softcap(out_BTV if scale == 1 else out_BTV * scale, cap)
