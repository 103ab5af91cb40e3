"""Processes, sharding, context parallelism and recomputation."""
