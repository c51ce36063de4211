"""Where the work is done.

A backend is a module with ``why_not``, ``ROW_SCALE``, and those of ``score_topk``, ``score_candidates``,
``log_partition`` and ``candidate_dots`` (for gradients) that it has.
"""
