"""``stts study``: runs (``command``), one evaluation (``evaluate``), tables (``results``)."""
