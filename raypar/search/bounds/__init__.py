"""How fast a step can be at most: `lower_bound`, and what it says about a plan."""

from raypar.search.bounds.bound import Bound, certificate, lower_bound

__all__ = ["Bound", "certificate", "lower_bound"]
