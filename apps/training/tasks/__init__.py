"""The kinds of training, by name; classes are imported when a configuration asks for them."""

TASKS: dict[str, str] = {
    "autoencoder": "apps.training.tasks.autoencoder:AutoencoderTask",
    "clip_text_pretraining": "apps.training.tasks.clip_text_pretraining:ClipTextPretrainingTask",
    "contrastive": "apps.training.tasks.contrastive:ContrastiveTask",
    "few_step": "apps.training.tasks.few_step:FewStepTask",
    "lora": "apps.training.tasks.lora:LoraTask",
    "lora_next_scale": "apps.training.tasks.lora_next_scale:LoraNextScaleTask",
    "multi_scale_tokenizer": "apps.training.tasks.multi_scale_tokenizer:MultiScaleTokenizerTask",
    "next_scale": "apps.training.tasks.next_scale:NextScaleTask",
    "text_encoder_pretraining": "apps.training.tasks.text_encoder_pretraining:TextEncoderPretrainingTask",
    "text_to_image": "apps.training.tasks.text_to_image:TextToImageTask",
    "text_to_video": "apps.training.tasks.text_to_video:TextToVideoTask",
    "value_model": "apps.training.tasks.value_model:ValueModelTask",
    "video_autoencoder": "apps.training.tasks.video_autoencoder:VideoAutoencoderTask",
}
OLD_NAMES = {"foresight": "value_model", "text_reading": "text_encoder_pretraining"}
"""Names that tasks had; they stay valid in configuration files."""
