"""Hybrids in other programs, as they were saved: the vLLM plugin. For what needs no plugin, see `exporting`."""
