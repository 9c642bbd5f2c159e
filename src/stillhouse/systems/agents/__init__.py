"""Systems that distil what agents did and know."""
