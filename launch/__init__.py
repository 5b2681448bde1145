"""Prepares, starts, sweeps, draws and watches jobs; everything here runs before or beside a job, never inside a step."""
