"""Mixtral backbone adapter for EulerForge."""
