"""All tables and figures in one report."""
