"""How ranks cooperate: the mesh, collectives, expert exchange and the sharded optimizer. Knows nothing of models."""
