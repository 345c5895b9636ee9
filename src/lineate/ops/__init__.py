"""Pure tensor functions: no modules, no state. Each eager function here is the reference for its faster backends."""
