import numpy as np
import pytest

from medsynth_jax.metrics import baselines

SPACING = (2.0, 2.0, 2.0)


def volumes(rule, count=3, shape=(12, 16, 14)):
  """Sources of smooth random intensity with noise, targets by `rule(source, its blur)`."""
  for seed in range(count):
    rng = np.random.default_rng(seed)
    base = baselines.blurred(rng.standard_normal(shape).astype(np.float32), SPACING, 5.0)
    noise = 0.3 * rng.standard_normal(shape)
    source = np.clip(base / base.std() * 0.4 + noise, -1, 0.999).astype(np.float32)
    mask = np.ones(shape, bool)
    mask[:, :3] = False
    yield source, rule(source, baselines.blurred(source, SPACING)), mask


def fitted(rule, **options):
  floor = baselines.Floor(**options)
  for source, target, mask in volumes(rule):
    # What lies outside the mask must not reach the floor.
    floor.add(source, np.where(mask, target, 1e9), mask, SPACING)
  return floor.fit()


def errors(floor, rule):
  source, target, mask = next(volumes(rule))
  rows = floor.predict(source, SPACING)
  return {k: float(np.sqrt(np.mean((v - target)[mask] ** 2))) for k, v in rows.items()}


def test_a_function_of_the_source_is_found():
  def steps(source, blur):
    return 100.0 * np.floor((source + 1) * 16) - 1000  # constant within each of the 128 bins

  got = errors(fitted(steps), steps)
  assert got["lut"] < 1e-3 < 100 < got["constant"]


def test_the_blur_adds_what_it_carries():
  def local(source, blur):
    return 500 * blur

  got = errors(fitted(local), local)
  assert got["lut2"] < 0.2 * got["lut"] < got["constant"]


def test_constant_is_the_mean_in_the_mask():
  floor = fitted(lambda source, blur: 3 * source + 1)
  values = np.concatenate([t[m] for _, t, m in volumes(lambda s, b: 3 * s + 1)])
  source = next(volumes(lambda s, b: s))[0]
  rows = floor.predict(source, SPACING)
  assert set(rows) == {"constant", "lut", "lut2"}
  assert rows["constant"] == pytest.approx(values.mean(), rel=1e-5)
  assert all(row.dtype == np.float32 and row.shape == source.shape for row in rows.values())


def test_lut_is_the_conditional_mean():
  rng = np.random.default_rng(0)
  source = rng.choice(np.float32([-1, 0, 1]), (8, 8, 8))
  target = source + rng.standard_normal(source.shape)
  floor = baselines.Floor()
  floor.add(source, target, np.ones(source.shape), SPACING)
  rows = floor.fit().predict(source, SPACING)
  for value in (-1, 0, 1):
    assert rows["lut"][source == value] == pytest.approx(target[source == value].mean(), rel=1e-5)
  # Between the intensities of training: between their means. Beyond: the nearest.
  unseen = floor.predict(np.full((1, 2, 2), 0.5, np.float32), SPACING)
  low, high = target[source == 0].mean(), target[source == 1].mean()
  assert np.all((unseen["lut"] - low) * (unseen["lut"] - high) < 0)
  beyond = floor.predict(np.full((1, 2, 2), 5.0, np.float32), SPACING)
  assert beyond["lut"] == pytest.approx(high, rel=1e-5)


def test_lut2_falls_back_where_training_never_was():
  source = np.full((6, 6, 6), -0.5, np.float32)
  floor = baselines.Floor()
  floor.add(source, source * 10, np.ones(source.shape), SPACING)
  spike = np.full((6, 6, 6), 0.5, np.float32)
  spike[3, 3, 3] = -0.5  # its intensity was seen, with another neighbourhood
  rows = floor.fit().predict(spike, SPACING)
  assert np.array_equal(rows["lut2"], rows["lut"])
  assert rows["lut2"][3, 3, 3] == pytest.approx(-5)


def test_blur_is_in_millimetres_and_three_dimensional():
  point = np.zeros((21, 41, 41), np.float32)
  point[10, 20, 20] = 1
  got = baselines.blurred(point, (4.0, 1.0, 2.0))
  for axis, spacing in enumerate((4.0, 1.0, 2.0)):
    index = np.arange(point.shape[axis]) - point.shape[axis] // 2
    profile = got.sum(axis=tuple(a for a in range(3) if a != axis))
    sd = spacing * np.sqrt((profile * index**2).sum() / profile.sum())
    assert sd == pytest.approx(3.0, rel=0.02)


def test_mean_image_is_the_mean_at_each_place():
  floor = baselines.Floor(common_grid=True)
  mask = np.ones((4, 6, 6), bool)
  mask[0] = False
  first, second = np.full(mask.shape, 2.0), np.full(mask.shape, 4.0)
  floor.add(first, first, mask, SPACING)
  floor.add(second, second, mask, SPACING)
  got = floor.fit().predict(np.zeros(mask.shape), SPACING)["mean_image"]
  assert np.all(got == 3)  # slice 0, never in a mask, has the constant


def test_mean_image_lays_unequal_crops_over_each_other_by_their_centres():
  floor = baselines.Floor(common_grid=True)
  for shape in ((3, 5, 5), (7, 9, 4), (4, 4, 8)):
    target = np.zeros(shape)
    target[tuple(n // 2 for n in shape)] = 10.0
    floor.add(np.zeros(shape), target, np.ones(shape), SPACING)
  floor.fit()
  for shape in ((5, 5, 5), (2, 12, 3)):
    got = floor.predict(np.zeros(shape), SPACING)["mean_image"]
    assert np.unravel_index(got.argmax(), shape) == tuple(n // 2 for n in shape)
    assert got.max() == 10


def test_the_named_channel_is_looked_up():
  rng = np.random.default_rng(1)
  source = rng.uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
  target = np.sign(source[..., 2])
  residual = {}
  for channel in (0, 2):
    floor = baselines.Floor(channel=channel)
    floor.add(source, target, np.ones(target.shape), SPACING)
    residual[channel] = np.abs(floor.fit().predict(source, SPACING)["lut"] - target).mean()
  assert residual[2] < 0.05 < 0.5 < residual[0]


def test_the_order_of_volumes_does_not_matter():
  def rule(source, blur):
    return source + blur

  forward, backward = baselines.Floor(), baselines.Floor()
  cases = list(volumes(rule))
  for case in cases:
    forward.add(*case, SPACING)
  for case in reversed(cases):
    backward.add(*case, SPACING)
  a, b = (f.fit().predict(cases[0][0], SPACING) for f in (forward, backward))
  for name in a:
    assert a[name] == pytest.approx(b[name], rel=1e-6)


def test_mistakes_are_refused():
  x = np.zeros((4, 4, 4))
  floor = baselines.Floor()
  with pytest.raises(ValueError, match="none"):
    floor.fit()
  with pytest.raises(ValueError, match="not fitted"):
    floor.predict(x, SPACING)
  with pytest.raises(ValueError, match="one shape"):
    floor.add(x, x[:3], x == 0, SPACING)
  with pytest.raises(ValueError, match="finite"):
    floor.add(x, x + np.nan, x == 0, SPACING)
  with pytest.raises(ValueError, match="millimetres"):
    floor.add(x, x, x == 0, (1.0, 0.0, 1.0))
  floor.add(x, x, x == 1, SPACING)  # a volume without a voxel in its mask adds nothing
  with pytest.raises(ValueError, match="none"):
    floor.fit()
