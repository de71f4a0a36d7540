"""Memory of a step with LoRA, as reported by the compiler."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_lora import SPEC

from elder_jax.model import lora
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask


def memory(num_layers: int, rank: int, remat: str):
  """The compiled step's memory_analysis for a model with 16 times more weights than activations; allocates nothing."""
  spec = dataclasses.replace(SPEC, d_model=128, head_dim=32, num_kv_heads=4, d_ff=384, rope_freq_RH=((1.0,) * 16,))
  model = jax.eval_shape(lambda: Decoder(spec, num_layers, jax.random.key(0)))
  if rank:
    model = lora.wrap(model, jax.eval_shape(lambda: lora.factors(model.layers, rank, 0)), 2.0)
  mask, rate = train_mask(model, 'lora' if rank else 'blocks'), learning_rate(1e-3, 10, 0.0)
  tx = make_optimizer(mask, rate, 0.0, 1.0)
  state, frozen = jax.eval_shape(lambda m: init_state(m, mask, tx), model)
  terms = {
    'alive_L': np.ones(num_layers, bool),
    'gate_weight_L': np.zeros(num_layers, np.float32),
    'delta_weight_L': np.zeros(num_layers, np.float32),
  }
  step = make_step(tx, Mode(remat=remat), 1, rate)
  return step.lower(state, (frozen, None), np.zeros((1, 16), np.int32), terms).compile().memory_analysis()


def per_layer(rank: int, remat: str) -> tuple[float, float]:
  """(bytes of weights and optimiser state, temporary bytes) of an additional layer."""
  few, more = (memory(n, rank, remat) for n in (2, 6))

  def slope(name):
    return (getattr(more, name) - getattr(few, name)) / 4

  return slope('argument_size_in_bytes'), slope('temp_size_in_bytes')


MATRIX_BYTES = 4 * (4 * 128 * 128 + 3 * 128 * 384)  # of a layer


@pytest.mark.usefixtures('whole_compiler')
def test_memory_of_full_training_holds_a_gradient_for_each_weight():
  arguments, temporary = per_layer(0, 'full')
  assert arguments > 3 * MATRIX_BYTES  # weights and two moments
  assert temporary > MATRIX_BYTES


@pytest.mark.usefixtures('whole_compiler')
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_memory_of_lora_holds_neither_gradients_nor_merged_weights_of_all_layers(remat):
  arguments, temporary = per_layer(2, remat)
  factors = 4 * 2 * (4 * (128 + 128) + 3 * (128 + 384))
  assert arguments < MATRIX_BYTES + 3 * factors + 2000  # norms, gates
  assert temporary < MATRIX_BYTES / 4, (temporary, MATRIX_BYTES)
