"""LoRA files: `files` reads them in all common layouts, `lycoris` LoHa and LoKr, `mixin` puts them on a transformer."""
