"""Tensors between ranks: the group interface, its backends, and gradient buckets."""
