"""Distillation with algorithm and model family apart: trainer, methods, adapters and the bundle of roles."""
