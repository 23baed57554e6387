"""A look into every queue, which changes nothing."""
