"""Methods that train on data alone: they make teachers."""
