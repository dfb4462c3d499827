"""Models of model_type olmo2."""
