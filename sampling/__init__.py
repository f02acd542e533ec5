"""Sampling across steps or scales: schedulers, guidance, objectives.

A network answers one call; everything that decides which calls are made, with which noise level, and what is
done with their answers lives here. Imports `dit`, never `pipelines` or `apps`.
"""
