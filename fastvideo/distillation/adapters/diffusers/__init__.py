"""Pieces that every family over a diffusers pipeline shares."""
