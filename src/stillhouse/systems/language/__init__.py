"""Systems that distil language models."""
