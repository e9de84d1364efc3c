"""Training: recipes, the start of a run, the loop, checkpoints."""
