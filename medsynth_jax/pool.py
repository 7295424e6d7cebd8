"""A pool of earlier synthetic images, shown to a discriminator instead of the newest ones.

Shrivastava et al., arXiv 1612.07828, as CycleGAN uses it. It is part of a method's state (`aux`),
so that a resumed run goes on with the same images.
"""

import jax
import jax.numpy as jnp


def empty(size: int, example: jax.Array) -> dict[str, jax.Array]:
  """A pool for `size` images of the shape of `example` [1, *space, C]."""
  return {"images": jnp.zeros((size, *example.shape[1:])), "count": jnp.zeros((), jnp.int32)}


def exchange(pool: dict[str, jax.Array], images: jax.Array, key: jax.Array
             ) -> tuple[dict[str, jax.Array], jax.Array]:
  """The pool with new images [B, *space, C] in it, and the images to be shown, [B, *space, C].

  While the pool fills, an image is stored and shown. Then it is shown and not stored, or with
  probability 1/2 takes the place of a stored one, which is shown.
  """
  size, count = len(pool["images"]), len(images)

  def one(state, drawn):
    slots, filled = state
    number, key = drawn
    coin_key, place_key = jax.random.split(key)
    filling = filled < size
    random = jax.random.randint(place_key, (), 0, size)
    place = jnp.where(filling, jnp.minimum(filled, size - 1), random)
    stores = filling | jax.random.bernoulli(coin_key)
    old = slots[place]
    slots = slots.at[place].set(jnp.where(stores, number, old))
    return (slots, jnp.minimum(filled + 1, size)), jnp.where(stores & ~filling, old, number)

  # By numbers, one after another; then all images move at once: moved within the loop, each would
  # travel between the devices by itself.
  state = jnp.arange(size), pool["count"]
  (slots, filled), shown = jax.lax.scan(
    one, state, (size + jnp.arange(count), jax.random.split(key, count)))
  images = jnp.concatenate([pool["images"], images])
  return {"images": images[slots], "count": filled}, images[shown]
