"""What a run will need, before it is started: bytes per role and process, arithmetic, traffic."""
