"""Panels of the command line's help that options stand in; a file of its own because `tessera --help` imports it."""

PROMPT, FILES, COUNT, SAMPLING = "Prompt and model", "From files", "Size and count", "Sampling"
SCALES, EDITING, SPEED, OUTPUT = "Next-scale models", "Image editing", "Speed and memory", "Output"
SERVER, MODELS, MEASURED, CHECKPOINT = "Server", "Models", "What is measured", "Checkpoint"
