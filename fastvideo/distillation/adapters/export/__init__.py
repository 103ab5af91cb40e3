"""Conventions of diffusers (schedulers, layouts) and ComfyUI (names) for students. No family imports this."""
