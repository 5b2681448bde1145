"""What one run is: model, precision, data, recipe, loop. Only `assemble` knows how ranks cooperate."""
