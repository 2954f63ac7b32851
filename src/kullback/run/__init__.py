"""What every training run shares: terms, controllers, seeds, run directory and progress. Imports nothing of ours."""
