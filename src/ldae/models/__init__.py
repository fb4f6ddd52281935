"""The networks: autoencoder, U-Net, gradient estimator, semantic encoder. They know neither diffusion nor data."""
