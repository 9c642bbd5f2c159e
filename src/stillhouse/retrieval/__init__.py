"""Search: by words, by vectors, and by both in one list."""
