"""A plan as a page: where memory, time and traffic go, drawn."""
