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
  size = len(pool["images"])

  def one(pool, drawn):
    image, key = drawn
    coin_key, place_key = jax.random.split(key)
    filling = pool["count"] < size
    random = jax.random.randint(place_key, (), 0, size)
    place = jnp.where(filling, jnp.minimum(pool["count"], size - 1), random)
    stores = filling | jax.random.bernoulli(coin_key)
    old = pool["images"][place]
    images = pool["images"].at[place].set(jnp.where(stores, image, old))
    count = jnp.minimum(pool["count"] + 1, size)
    return {"images": images, "count": count}, jnp.where(stores & ~filling, old, image)

  return jax.lax.scan(one, pool, (images, jax.random.split(key, len(images))))
