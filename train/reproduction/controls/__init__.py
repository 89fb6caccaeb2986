"""Controls that need no training."""
