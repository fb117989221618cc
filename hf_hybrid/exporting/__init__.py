"""Hybrids in the layouts that other programs serve: what fits, the weights of each, and the proof that they agree."""
