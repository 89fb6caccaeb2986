"""Measures of images, of scores, and of their uncertainty."""
