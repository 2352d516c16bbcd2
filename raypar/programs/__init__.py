"""One stage as code: slicing, joint trace, partition, code generation, wire form."""
