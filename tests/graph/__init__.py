"""Tests of the model as data."""
