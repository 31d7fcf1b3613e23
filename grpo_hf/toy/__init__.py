"""CS336 lecture 17's sorting task: its model, its experiments, and a setting that solves it, in seconds."""
