"""Where nodules lie, and how large they are."""
