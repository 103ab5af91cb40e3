"""The run's config: pure values below methods, families and engine."""
