"""Whole key providers as processes, and faults."""
