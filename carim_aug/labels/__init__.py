"""What a nodule does to a label."""
