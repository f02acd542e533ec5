"""The HTTP API: the engine for programs, with tokens, limits and errors that tell nothing about the machine."""
