"""Schedulers that diffusers lacks, each a diffusers SchedulerMixin."""

from sampling.schedulers.flow_match_sde import FlowMatchSDEScheduler

__all__ = ["FlowMatchSDEScheduler"]
