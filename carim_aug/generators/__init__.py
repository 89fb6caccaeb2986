"""What makes nodules, and the files that hold its weights."""
