"""One file per generator family, each class a diffusers ModelMixin."""
