"""What a stage costs on a mesh: `machine` (devices and links), `base` (the contract), models."""
