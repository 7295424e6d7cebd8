"""Medical image synthesis in JAX: one scan made from another, with honest scores per patient."""

__version__ = "0.1.0"
