"""Simulate deployments of Nemotron-TwoTower: which GPUs, how many, which threshold, which batch."""

__version__ = "0.1.0"
