"""``stts make-data`` and ``stts quickstart``: made videos (``synthetic_scenes``, ``make_data``)."""
