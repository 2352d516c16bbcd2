"""Tutorials, and the scripts that make the reference and the picture."""
