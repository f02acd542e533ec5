"""Training: one readable loop, exact-resume checkpoints, and tasks that say what is learned."""
