"""Schedulers that diffusers lacks, each a diffusers SchedulerMixin."""
