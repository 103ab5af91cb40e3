"""LTX-2 over diffusers: videos with their sound."""
