"""What grafts do for a detector."""
