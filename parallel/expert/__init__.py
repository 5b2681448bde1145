"""Expert parallelism: where experts live, and how tokens travel to them and back (locally, flat, in two hops)."""
