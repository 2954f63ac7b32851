"""What every training run shares: terms, controllers, seeds, the run directory and progress. Imports nothing of ours."""
