"""Gemma 3 backbone adapter for EulerForge."""
