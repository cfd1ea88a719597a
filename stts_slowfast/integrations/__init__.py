"""Selection in other libraries' training loops: a callback for transformers' ``Trainer``."""
