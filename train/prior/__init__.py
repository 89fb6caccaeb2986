"""The location prior."""
