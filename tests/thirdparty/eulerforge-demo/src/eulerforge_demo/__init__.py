"""A third party's strategy and backbone for EulerForge."""
