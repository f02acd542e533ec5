"""The kinds of training, by name; classes are imported when a configuration asks for them."""

TASKS: dict[str, str] = {
    "autoencoder": "apps.training.tasks.autoencoder:AutoencoderTask",
    "text_to_image": "apps.training.tasks.text_to_image:TextToImageTask",
}
