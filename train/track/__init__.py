"""What a run reports, and where it goes: metrics by name, their files, console and wandb."""
