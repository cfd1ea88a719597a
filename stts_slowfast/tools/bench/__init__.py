"""``stts bench``: rows (``spec``), loaders (``loader``) and the command."""
