"""``stts report``: reads what runs left (``run_log``), published accuracies (``published``), the page."""
