"""Schedulers that diffusers lacks, each a diffusers SchedulerMixin."""

from sampling.schedulers.flow_match_ab2 import FlowMatchAB2Scheduler
from sampling.schedulers.flow_match_sde import FlowMatchSDEScheduler

__all__ = ["FlowMatchAB2Scheduler", "FlowMatchSDEScheduler"]
