"""The CARIM-cGAN."""
