"""The latent space of trained runs in a browser: models, server, page."""
