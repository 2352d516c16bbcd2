"""The law as a check, random plans, the model zoo, and conformance suites for third parties."""
