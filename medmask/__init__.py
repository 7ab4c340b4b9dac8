"""Robust pretraining and finetuning of medical image classifiers on HPC clusters."""

__version__ = "0.1.0"
