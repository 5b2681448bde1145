"""Token shards to rows of training, each a function of (seed, position)."""
