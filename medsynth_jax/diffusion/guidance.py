"""Classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def classifier_free(predict: Callable, weight: float) -> Callable:
  """Guides a network that knows a code: null + weight * (code - null), in what it predicts.

  Args:
    predict: (x [B, ...], level [B], code [B]) -> network output; evaluated for both codes by vmap
      over a new leading axis, so that examples keep their place in the batch.
    weight: 1 is the conditional network alone, evaluated once; larger strengthens the code.

  Returns:
    (x, level, code [B], null) -> guided output; `null` is an integer or [B].
  """
  if weight == 1:
    return lambda x, level, code, null: predict(x, level, code)

  def guided(x, level, code, null):
    codes = jnp.stack([code, jnp.broadcast_to(jnp.asarray(null, code.dtype), code.shape)])
    conditional, unconditional = jax.vmap(predict, (None, None, 0))(x, level, codes)
    return unconditional + weight * (conditional - unconditional)

  return guided
