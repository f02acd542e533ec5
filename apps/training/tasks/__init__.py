"""The kinds of training, by name; classes are imported when a configuration asks for them."""

TASKS: dict[str, str] = {
    "autoencoder": "apps.training.tasks.autoencoder:AutoencoderTask",
    "contrastive": "apps.training.tasks.contrastive:ContrastiveTask",
    "foresight": "apps.training.tasks.foresight:ForesightTask",
    "multi_scale_tokenizer": "apps.training.tasks.multi_scale_tokenizer:MultiScaleTokenizerTask",
    "next_scale": "apps.training.tasks.next_scale:NextScaleTask",
    "text_reading": "apps.training.tasks.text_reading:TextReadingTask",
    "text_to_image": "apps.training.tasks.text_to_image:TextToImageTask",
}
