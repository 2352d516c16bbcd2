"""The clean-up passes that make a raw trace a pure graph."""
