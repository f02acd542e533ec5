"""LoRA files: `files` reads them in all common layouts, `mixin` puts them on a pipeline's transformer."""
