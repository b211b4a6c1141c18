"""Spin physics, likelihood, posteriors, confidence regions, stopping, and the next pulse: arrays in, arrays out."""
