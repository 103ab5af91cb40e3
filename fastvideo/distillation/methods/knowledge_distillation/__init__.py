"""Methods that regress what the teacher produced."""
