"""Conventions of other programs: schedulers, layouts of latents, names of weights. No family imports this."""
