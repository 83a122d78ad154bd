"""Base optimizers, their schedules, and the direction of their momentum."""
