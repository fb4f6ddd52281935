"""Diffusion without networks or config: coefficients in float64, and samplers over `eps_fn(z_t, t) -> eps`."""
