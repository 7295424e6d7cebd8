"""Starts runs: on this machine, on SLURM, on a TPU pod, and sweeps of them."""
