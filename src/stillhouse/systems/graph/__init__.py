"""Systems that distil graph data and graph networks."""
