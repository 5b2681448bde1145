"""Pictures and pages that people look at: curves, bars over time, the report."""
