"""Optimisers as optax chains: clipping, Adam, schedule, moving average, accumulation."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from medsynth_jax.contract import Average
from medsynth_jax.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


def schedule(optim: ConfigDict, updates: int) -> optax.Schedule:
  """Learning rate over the updates of a net.

  `constant`: lr. `linear`: lr for the first `hold` share of the run, then linearly to 0.
  `cosine`: to 0 over the run. All start with `warmup` updates from 0.
  """
  if optim.schedule not in SCHEDULES:
    raise UserError(f"optim.schedule={optim.schedule!r}: choose one of {', '.join(SCHEDULES)}")
  updates = max(1, updates)
  if optim.schedule == "constant":
    main = optax.constant_schedule(optim.lr)
  elif optim.schedule == "linear":
    hold = int(optim.hold * updates)
    main = optax.linear_schedule(optim.lr, 0.0, max(1, updates - hold), hold)
  else:
    main = optax.cosine_decay_schedule(optim.lr, updates)
  if not optim.warmup:
    return main
  ramp = optax.linear_schedule(0.0, 1.0, optim.warmup)
  return lambda count: ramp(count) * main(count)


def average(decay: float) -> optax.GradientTransformation:
  """Moving average of the updated parameters, the last link of a chain.

  The decay of update n is min(decay, (1 + n) / (10 + n)), so that the random start is forgotten
  in short runs too. Gradients pass unchanged.
  """
  def init(params):
    return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params))

  def step(updates, state, params=None):
    d = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
    move = lambda a, p, u: d * a + (1 - d) * (p + u)  # noqa: E731
    return updates, Average(state.count + 1, jax.tree.map(move, state.params, params, updates))

  return optax.GradientTransformation(init, step)


def make(optim: ConfigDict, steps: int, *, every: int = 1, ema: bool = True,
         lr: float | None = None) -> optax.GradientTransformation:
  """The optimiser of one net.

  Args:
    optim: name, lr, b1, b2, weight_decay, clip, ema, schedule, hold, warmup, accumulate.
    steps: batches of the stage.
    every: the net is updated once in this many batches (n_critic).
    ema: keep a moving average, if optim.ema is set.
    lr: another learning rate than optim.lr.
  """
  rate = schedule(optim if lr is None else ConfigDict({**optim, "lr": lr}),
                  steps // (every * optim.accumulate))
  links = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
  links.append(optax.adamw(rate, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay))
  if ema and optim.ema:
    links.append(average(optim.ema))
  chain = optax.chain(*links)
  if optim.accumulate == 1:
    return chain
  return optax.MultiSteps(chain, optim.accumulate).gradient_transformation()
