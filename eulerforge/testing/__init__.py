"""For tests and plugin authors; the core never imports this package."""
