"""Algorithms proved on distributions whose velocity is known exactly."""
