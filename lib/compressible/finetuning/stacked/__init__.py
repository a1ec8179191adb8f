"""S adapters, heads and optimiser states on one copy of a model's structure."""
