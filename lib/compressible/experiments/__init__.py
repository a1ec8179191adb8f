"""Protocols that several notebooks share: starts compared over seeds, recommenders, trajectories."""
