"""Text to training rows: find documents, tokenise them once into memory-mapped shards, and serve rows of tokens as a
pure function of (seed, position), so that neither topology nor restarts change what a run reads."""
