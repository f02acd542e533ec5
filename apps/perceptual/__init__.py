"""Pretrained networks that judge images; the project trained none of them."""

from apps.perceptual.st_lpips import ShiftTolerantLPIPS, load_st_lpips

__all__ = ["ShiftTolerantLPIPS", "load_st_lpips"]
