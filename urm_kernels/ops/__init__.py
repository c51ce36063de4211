"""torch.library ops, one file a family: schema, fake and autograd side by side; the work is done by a backend.

Registered with ``Library.define`` and ``impl``, which cost a call less than ``custom_op``. An autograd formula written
in Python costs every call a second crossing of the dispatcher, about as much as a small scan itself; calls that need
no gradient therefore go to an op without one.

Every op takes a table as sixteen arguments: items, bias, row_scale, alive (bits of rows not removed), the number of its
update log, 0 where it has none (urm_kernels.updates), what it is packed into (urm_kernels.backends.codes), and the
number of what remembers what that was made from (urm_kernels.freshness).
"""

from . import library
from .candidates import score_candidates
from .explore import explore_topk
from .partition import log_partition
from .topk import score_topk

__all__ = ["explore_topk", "library", "log_partition", "score_candidates", "score_topk"]
