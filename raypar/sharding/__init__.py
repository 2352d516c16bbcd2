"""One tensor over one mesh: states, conversions, rules per op, lowering to a local graph."""
