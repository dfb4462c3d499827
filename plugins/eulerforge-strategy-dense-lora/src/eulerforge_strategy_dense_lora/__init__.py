"""Dense LoRA injection strategy for EulerForge."""
