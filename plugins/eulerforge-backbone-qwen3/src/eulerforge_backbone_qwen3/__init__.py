"""Qwen3 backbone adapter for EulerForge."""
