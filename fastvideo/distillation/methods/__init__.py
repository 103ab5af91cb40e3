"""The algorithms, by what they match: distributions, consistency, trajectories (knowledge), or plain data."""
