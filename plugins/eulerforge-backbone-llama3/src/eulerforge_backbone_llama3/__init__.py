"""Llama 3 backbone adapter for EulerForge."""
