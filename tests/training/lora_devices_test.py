"""LoRA and adafactor train the same on eight devices as on one."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_lora import SPEC

from elder_jax.devices import sharding
from elder_jax.model import lora
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import combine
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask

WIDE = dataclasses.replace(
  SPEC, d_model=128, d_ff=128, vocab_size=48
)  # adafactor factors matrices with two axes of at least 128
COMPILED: list[str] = []  # events that JAX reports
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **more: COMPILED.append(event) if 'backend_compile' in event else None
)


def trained_on(sizes: tuple[int, ...], kind: str, rank: int) -> dict:
  """Two steps on a mesh: losses, shardings of factors and moments, number of compilations."""
  whole = Decoder(WIDE, 2, jax.random.key(0))
  batches = np.random.default_rng(0).integers(0, WIDE.vocab_size, (2, 8, 9), np.int32)
  terms = {
    'alive_L': np.ones(2, bool),
    'gate_weight_L': np.zeros(2, np.float32),
    'delta_weight_L': np.zeros(2, np.float32),
  }
  mesh = sharding.make_mesh(sizes, jax.devices()[: 1 if sizes == (1, 1, 1) else 8])
  with jax.set_mesh(mesh):
    model = jax.tree.map(jax.device_put, whole, sharding.for_model(whole, mesh, sizes))
    model = lora.attach(model, rank, 4.0, 0) if rank else model
    mask, rate = train_mask(model, 'lora' if rank else 'blocks'), learning_rate(1e-2, 2, 0.0)
    tx = make_optimizer(mask, rate, 0.0, 1.0, kind)
    step, (state, frozen) = make_step(tx, Mode(), 1, rate), init_state(model, mask, tx)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    lies = {jax.tree_util.keystr(p): [[*a.shape], [*a.sharding.shard_shape(a.shape)]] for p, a in leaves}
    losses = []
    for batch in (sharding.put_batch(b, mesh) for b in batches):
      COMPILED.clear()
      state, metrics = step(state, (frozen, None), batch, terms)
      again = len(COMPILED)  # after the loop, of the second step
      losses.append(float(metrics['loss']))
    facts = {'losses': losses, 'again': again, 'lies': lies}
    if rank:
      merged, before = lora.merge(combine(state.trained, frozen)), model.layers.wq.base.get_value()
      wq = merged.layers.wq.get_value()
      assert wq.sharding == before.sharding
      facts['moved'] = np.asarray(wq - before).ravel()
    return facts


@pytest.mark.slow
def test_eight_devices_train_like_one(eight_devices):
  facts = {
    f'{",".join(map(str, sizes))} {kind}': trained_on(sizes, kind, rank)
    for sizes in ((1, 1, 1), (2, 2, 2))
    for kind, rank in (('adamw', 2), ('adafactor', 0))
  }
  for kind in ('adamw', 'adafactor'):
    one, eight = facts[f'1,1,1 {kind}'], facts[f'2,2,2 {kind}']
    np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-5)
    assert one['losses'][1] != one['losses'][0] and one['again'] == eight['again'] == 0
  np.testing.assert_allclose(facts['2,2,2 adamw']['moved'], facts['1,1,1 adamw']['moved'], atol=1e-5)
  assert np.abs(facts['1,1,1 adamw']['moved']).max() > 1e-3
  ways = {'wq.a': 2, 'wq.b': 2, 'wo.a': 2, 'wo.b': 2, 'w_up.a': 2, 'w_down.b': 2}  # D over fsdp, N and F over tp
  for name, (shape, shard) in facts['2,2,2 adamw']['lies'].items():
    for part, n in ways.items():
      if f'.{part}.value' in name:
        assert np.prod(shape) == n * np.prod(shard), (name, shape, shard)
  lies = facts['2,2,2 adafactor']['lies']
  rows = [name for name in lies if '.v_row.layers.w_up' in name]
  assert len(rows) == 1 and lies[rows[0]] == [[2, 128], [2, 128]]
