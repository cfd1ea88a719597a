"""What a person runs: the command ``stts`` and its parts."""
