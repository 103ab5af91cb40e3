"""Forecast a run's needs before it is started: bytes per role and process, arithmetic, traffic."""
