"""Prepares, starts, sweeps, draws and watches jobs; all before or beside a job, never inside a step."""
