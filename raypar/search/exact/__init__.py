"""Solvers for the published planners' own cost models."""
