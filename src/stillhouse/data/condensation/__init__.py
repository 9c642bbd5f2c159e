"""Data sets made small: computation trees, frequent sets, expert trajectories, learnable images."""
