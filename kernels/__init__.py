"""Fused log-probabilities: logprob.py holds the torch reference, which is also the CPU path."""
