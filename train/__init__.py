"""Recipes that produce the weights of `carim_aug`; run from a checkout as `python -m train.NAME`."""
