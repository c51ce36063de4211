_Matrix = tuple[int, int, int, int, int, int]
_Queries = tuple[int, int, int, int, int]
_Filter = tuple[int, int, int, int, int, int]

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def threads(torch_threads: int) -> int: ...
def score_topk(
    queries: _Queries,
    items: _Matrix,
    bias: _Matrix,
    reduce: int,
    filter: _Filter,
    k: int,
    sorted: bool,
    torch_threads: int,
    scores: int,
    ids: int,
) -> None: ...
def candidate_dots(
    queries: _Queries, items: _Matrix, candidates: int, count: int, torch_threads: int, out: int
) -> None: ...
def read_bandwidth(data: int, count: int, threads: int) -> float: ...
def fma_rate(steps: int, threads: int) -> float: ...
