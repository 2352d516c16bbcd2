"""Graph × cluster → plan."""
