"""Distil segmentation networks with AICSD, export them, prove what runs, and run them on live video."""

__version__ = "0.1.0"
