"""Systems that distil vision models."""
