"""How other programs run students of the families: diffusers' schedulers, ComfyUI's names. No family imports this."""
