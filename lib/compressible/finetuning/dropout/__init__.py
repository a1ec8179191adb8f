"""Dropout with a random stream of its own for each run of a stack."""
