"""Learning-rate schedules."""

import numpy as np
import pytest

from elder_jax.training.optimizer import learning_rate


def test_linear_schedule_with_warmup():
  r = learning_rate(2.0, 100, 0.1)
  rates = np.array([float(r(i)) for i in range(100)])
  np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
  assert rates.max() == rates[9] == rates[10] == 2.0 and rates[0] > 0
  np.testing.assert_allclose(rates[10:], 2.0 * np.arange(90, 0, -1) / 90, rtol=1e-6)
  assert float(r(100)) == 0 and 0 < rates[-1] < 0.03


@pytest.mark.parametrize('warmup', [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize('steps', [1, 2, 3, 10])
def test_no_step_has_a_rate_of_0(steps, warmup):
  r = learning_rate(1.0, steps, warmup)
  rates = [float(r(i)) for i in range(steps)]
  assert min(rates) > 0 and max(rates) == 1.0
  if not warmup:
    assert rates[0] == 1.0


@pytest.mark.parametrize(
  'schedule, final, expected',
  [
    ('linear', 0.25, [0.5, 1, 1, 0.90625, 0.8125, 0.71875, 0.625, 0.53125, 0.4375, 0.34375]),
    ('linear', 1.0, [0.5, *9 * [1]]),
    ('cosine', 0.0, [0.5, 1, *((1 + np.cos(np.pi * i / 8)) / 2 for i in range(8))]),
    ('cosine', 0.1, [0.5, 1, *(0.1 + 0.45 * (1 + np.cos(np.pi * i / 8)) for i in range(8))]),
    ('wsd', 0.0, [0.5, *6 * [1], 1, 2 / 3, 1 / 3]),
    ('wsd', 0.4, [0.5, *6 * [1], 1, 0.8, 0.6]),
  ],
)
def test_rates_of_all_schedules(schedule, final, expected):
  r = learning_rate(2.0, 10, 0.2, schedule, final, decay_ratio=0.3)
  rates = [float(r(i)) for i in range(11)]
  np.testing.assert_allclose(rates[:10], 2 * np.array(expected), rtol=1e-6)
  np.testing.assert_allclose(rates[10], 2 * final, atol=1e-7)


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
@pytest.mark.parametrize('steps, warmup, decay', [(1, 0.0, 1.0), (2, 0.5, 0.5), (10, 0.0, 0.0), (10, 0.6, 0.9)])
def test_all_schedules_reach_the_peak_and_stay_above_0(schedule, steps, warmup, decay):
  r = learning_rate(1.0, steps, warmup, schedule, 0.0, decay)
  rates = [float(r(i)) for i in range(steps)]
  assert min(rates) > 0 and max(rates) == 1.0


def test_a_long_cosine_stays_above_0():
  r = learning_rate(1.0, 10**5, 0.0, 'cosine')
  np.testing.assert_allclose(float(r(10**5 - 1)), np.sin(np.pi / 2 / 10**5) ** 2, rtol=1e-4)
