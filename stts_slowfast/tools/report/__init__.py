"""``stts report``: what runs left (``run_log``) and the page about it (``command``)."""
