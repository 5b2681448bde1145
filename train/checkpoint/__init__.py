"""Checkpoints: their settings, what is in them, how they are written, found and read under any layout of ranks."""
