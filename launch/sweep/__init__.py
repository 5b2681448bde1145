"""Many jobs that differ in a few settings: proposed by a grid or by Optuna, run side by side, compared at the end."""
