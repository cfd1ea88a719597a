"""The runner without SlowFast: same YAML, same command line, same checkpoints."""
