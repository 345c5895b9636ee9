"""Models of this project's own, for papers whose own code cannot be used; they know nothing of conversion."""
