"""lineate."""
