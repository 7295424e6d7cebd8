"""Gaussian diffusion: noise schedules, parametrisations, samplers. No network, data or training.

With signal^2 = alpha_bar and sigma^2 = 1 - alpha_bar, a noisy image is x = signal x0 + sigma noise.
A noise level is the log-SNR, log(alpha_bar) - log(1 - alpha_bar), as float32 [B]: it is precise at
both ends, where alpha_bar itself is not, and -inf is a level too: noise without any signal.
"""
