"""The decoder: stacked layers in one scan, with a gate per layer.

Dimensions, used as suffixes of array names:
  B batch, T token, L layer, D model width, N query heads, K key/value heads, G query heads per key/value head,
  H head width, F feed-forward width, V vocabulary.

The modules are Flax NNX modules used as typed pytrees. Every function here is pure and works under jax.jit, jax.grad and
jax.lax.scan.
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from elder_jax.devices import sharding
from elder_jax.model import products
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
  """A decoder-only transformer. `gate_L` (fp32) holds one gate per layer; with all gates at 1 it is the plain network."""

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
  """Runs the network up to and including the final norm.

  Args:
    tokens_BT: int32 token ids.
    alive_L: bool per layer. A layer that is not alive is skipped at no cost: it is the identity. None: all are alive.
    mode: See Mode.
    gate_L: Gates (fp32) to use instead of the model's own.
    measure: (update d_BTD of a layer, its input x_BTD) -> fp32 scalar. None: nothing is measured.

  Returns:
    x_BTD in the computation dtype, the input of `logits_of` and losses.next_token_nll; and delta_L (fp32), the `measure`
    of each layer. delta_L is 0 for skipped layers, and everywhere if `measure` is None.
  """
  x_BTD, delta_L = run_layers(model, embed(model, tokens_BT, mode), alive_L, mode, gate_L, measure=measure)
  return final_norm(model, x_BTD), delta_L


def embed(model: Decoder, tokens_BT, mode: Mode = Mode(), position_T=None, batch_axis: int = 0):
  """Returns x_BTD, the input of the first layer.

  Args:
    position_T: Positions of the tokens; None: 0 … T − 1.
    batch_axis: The axis of tokens_BT that is sharded over the devices.
  """
  spec = model.spec

  # Devices that share the width look up their part of it for all of their tokens and exchange the results. The embedding
  # table itself is not gathered.
  def over(axis, *width):
    return (*(axis if i == batch_axis else None for i in range(2)), *width)

  tokens_BT = sharding.constrain(tokens_BT, *over('data'))
  x_BTD = jnp.take(model.embed[...], tokens_BT, axis=0).astype(mode.dtype)
  x_BTD = sharding.constrain_batch(sharding.constrain(x_BTD, *over('data', 'fsdp')), batch_axis)
  if spec.embed_scale != 1:
    x_BTD = x_BTD * jnp.asarray(spec.embed_scale, mode.dtype)
  if spec.num_positions:
    position_T = jnp.arange(tokens_BT.shape[1]) if position_T is None else position_T
    # Padding may have positions beyond the table. Without clip it would read NaN, and 0 · NaN in attention is NaN.
    p_TD = jnp.take(whole(model.positions), position_T + spec.position_offset, axis=0, mode='clip')
    x_BTD = x_BTD + p_TD[None].astype(mode.dtype)
  return x_BTD


def final_norm(model: Decoder, x_BTD):
  """Applies the final norm, if the model has one."""
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
  """Runs only the layers, on hidden states x_BTD of positions 0 … T − 1. Other arguments as in `forward`.

  To start at a later layer, pass the input of that layer and an alive_L that is False for the layers before it.

  Args:
    inputs: Whether to return the input of each layer as well.
    compare: (f, y_LBTD): returns f(input x_BTD of layer l, y_LBTD[l]) for each layer, fp32 scalars. Not with `inputs`.

  Returns:
    (x_BTD after the last layer and before the final norm, delta_L), followed by x_LBTD if `inputs`, or by the results of
    f if `compare`.
  """
  if alive_L is None:
    # Without the barrier the compiler removes the branch below and fuses differently, which changes some last bits.
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
      # Remat inside the branch as well. Otherwise the backward pass recomputes the layer in one branch and passes all
      # residuals, including the scores of attention, through memory to another branch.
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
  """Remat policy: saves activations, but not cast or gathered weights, which would be in memory for all layers at once."""
  return primitive.name not in ('convert_element_type', 'sharding_constraint', 'custom_vjp_call')  # sharding.gather's


def head_of(model: Decoder):
  """Returns the gathered output head: (weights_VD, float32 bias_V or None). Call it once, outside of loops."""
  weights_VD = whole(model.embed if model.head is None else model.head)
  return weights_VD, None if model.head_bias is None else whole(model.head_bias, jnp.float32)


def logits_of(model: Decoder, x_BTD, gathered=None):
  """Returns float32 logits_BTV for the hidden states of `forward`.

  For a loss use losses.next_token_nll, which never holds all logits in memory.

  Args:
    gathered: The result of `head_of`; None: gathered here.
  """
  return project(head_of(model) if gathered is None else gathered, x_BTD, model.spec.outputs())


def project(gathered, x_BTD, outputs: tuple[float, float | None]):
  """Returns float32 logits_BTV. gathered: the result of `head_of`; outputs: Spec.outputs of the model."""
  scale, cap = outputs
  weights_VD, bias_V = gathered
  out_BTV = products.einsum('BTD,VD->BTV', x_BTD, weights_VD.astype(x_BTD.dtype), jnp.float32)
  out_BTV = out_BTV if bias_V is None else out_BTV + wide(bias_V, out_BTV)
  return softcap(out_BTV if scale == 1 else out_BTV * scale, cap)
