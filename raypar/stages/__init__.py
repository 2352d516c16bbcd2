"""A plan at work: rank specs, interpreter, stage actors, driver actor."""
