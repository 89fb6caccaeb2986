"""The command line, pictures and export."""
