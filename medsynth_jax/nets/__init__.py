"""Networks: Flax modules, pure functions of their inputs, 2-D or 3-D by the rank of the input."""
