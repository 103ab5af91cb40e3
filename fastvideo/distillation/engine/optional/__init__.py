"""Parts of the engine that a run can do without; the config switches them on."""
