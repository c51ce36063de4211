"""Where the work is done. A backend is a module with ``why_not``, ``score_topk`` and ``candidate_dots``."""
