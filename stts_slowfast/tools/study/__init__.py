"""``stts study``: the runs (``command``), each evaluation (``evaluate``), tables and plots (``results``)."""
