"""Faces of other libraries' quantizers: their signatures, returns and state dicts over vqfast's search."""
