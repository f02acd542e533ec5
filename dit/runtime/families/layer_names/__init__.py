"""What the layers of each family are called: `rule` says how it is written down, the other files are the tables."""
