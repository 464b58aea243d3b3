"""Compiling, caching, loading and launching kernels; nothing here knows what they compute."""
