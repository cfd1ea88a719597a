"""The same job where SlowFast is not installed: same YAML, same command line, same checkpoints."""
