"""Figures 3 to 7."""
