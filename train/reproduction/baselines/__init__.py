"""The class-conditional baselines of Table 1."""
