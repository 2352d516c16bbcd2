"""Models, data sources and runs to copy from; run them from the repository's root."""
