"""What calls of pipelines are given, read and checked: prompts, classes, images with masks, numbers."""
