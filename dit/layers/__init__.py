"""Small, pure building blocks of the networks, with shapes on every line."""
