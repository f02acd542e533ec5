"""The ground that all mechanisms stand on."""
