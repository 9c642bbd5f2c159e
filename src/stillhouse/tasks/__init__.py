"""Tasks: what a domain hands to systems, on embedded data or on the user's models and data."""
