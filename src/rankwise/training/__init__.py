"""Training from one configuration: data, trainers, metrics, resume."""
