"""Documents to token shards, whole or not at all, going on where a killed call stopped."""
