"""Stage 3: a diffusion model learns to draw what codes stand for; and the autoencoder it draws with."""
