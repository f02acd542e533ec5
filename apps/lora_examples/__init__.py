"""Small data sets of the sticker worlds, for examples of fine-tuning whose outcome is measured exactly.

`python -m apps.lora_examples object FOLDER` writes images of a sticker that the built-in model has never drawn,
`python -m apps.lora_examples motion FOLDER` clips of a motion that the built-in model of clips doesn't know. The style
example is `python -m apps.stickers.fluent FOLDER`.
"""
