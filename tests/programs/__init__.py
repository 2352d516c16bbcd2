"""Tests of stage programs."""
