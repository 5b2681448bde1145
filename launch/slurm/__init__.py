"""Runs as jobs of Slurm: checked and copied before they are queued, asked to save in time, requeued until done."""
