"""Checkpoints: written whole, verified and restored exactly."""
