"""Table 2: what synthetic images do for a classifier."""
