"""The test suite; folders carry other names than the packages, so that no import can be shadowed."""
