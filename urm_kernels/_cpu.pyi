_Matrix = tuple[int, int, int, int, int, int]
_Queries = tuple[int, int, int, int, int]
_Filter = tuple[int, int, int, int, int, int]
_Overlay = tuple[int, int, _Matrix, _Matrix, _Matrix]
_Table = tuple[_Matrix, _Matrix, _Matrix, _Overlay, int]

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def threads(torch_threads: int) -> int: ...
def score_topk(
    queries: _Queries,
    table: _Table,
    reduce: int,
    filter: _Filter,
    k: int,
    sorted: bool,
    torch_threads: int,
    scores: int,
    ids: int,
) -> None: ...
def log_partition(
    queries: _Queries,
    table: _Table,
    reduce: int,
    filter: _Filter,
    temperature: float,
    torch_threads: int,
    out: int,
) -> None: ...
def log_partition_backward(
    queries: _Queries,
    table: _Table,
    reduce: int,
    filter: _Filter,
    temperature: float,
    torch_threads: int,
    logarithms: int,
    grad: int,
    grad_queries: int,
    grad_items: int,
    grad_bias: int,
) -> float: ...
def score_candidates(
    queries: _Queries,
    table: _Table,
    reduce: int,
    candidates: int,
    count: int,
    shared: bool,
    reduced: bool,
    torch_threads: int,
    out: int,
) -> None: ...
def write_rows(target: int, stride_bytes: int, row_bytes: int, rows: int, count: int, source: int) -> None: ...
def upper_bounds(queries: _Queries, items: _Matrix, out: int) -> bool: ...
def read_bandwidth(data: int, count: int, threads: int) -> float: ...
def code_rate(steps: int, threads: int) -> float: ...
def fma_rate(steps: int, threads: int) -> float: ...
