"""Qwen3.5 backbone adapter for EulerForge."""
