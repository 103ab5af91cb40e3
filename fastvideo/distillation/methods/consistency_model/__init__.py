"""Methods that learn a map constant along the teacher's probability-flow trajectories."""
