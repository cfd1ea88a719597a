"""The guest inside SlowFast."""
