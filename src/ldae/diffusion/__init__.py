"""Diffusion without networks and without config: coefficients in float64, samplers over `eps_fn(z_t, t) -> eps`."""
