"""Where the work is done.

A backend is a module with ``why_not``, ``ROW_SCALE``, ``COUNTS``, and those of ``score_topk``, ``score_candidates``,
``log_partition`` and ``candidate_dots`` (for gradients) that it has. One that cannot use a packed table's codes scans
its factors, with the same result.
"""
