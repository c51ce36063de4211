"""What importing costs and touches."""

import statistics

from support import run_python


def test_importing_touches_no_triton_no_cuda_and_no_compiler():
    out = run_python("""
        import subprocess, sys
        import torch
        before = set(sys.modules)
        def refuse(*arguments, **settings):
            raise AssertionError(f"a process was started: {arguments}")
        subprocess.Popen.__init__ = refuse
        import urm_kernels
        new = set(sys.modules) - before
        ours = "urm_kernels.backends.cuda"  # plain Python until its first call
        new = [n for n in new if n != ours and not n.startswith(ours + ".")]
        print(sorted(n for n in new if n.split(".")[0] in ("triton", "cupy", "pybind11", "torch_cuda") or "cuda" in n))
        print(torch.cuda.is_initialized(), "triton" in sys.modules)
        print(set(dir(urm_kernels)) >= set(urm_kernels.__all__))
    """)
    assert out.splitlines() == ["[]", "False False", "True"]


def test_importing_adds_less_than_0_3_seconds_to_torch():
    # Measured 0.02 to 0.1 s; the median of five forgives a busy machine.
    code = """
        import time
        import torch
        begin = time.perf_counter()
        import urm_kernels
        print(time.perf_counter() - begin)
    """
    assert statistics.median(float(run_python(code)) for _ in range(5)) < 0.3


def test_the_extension_is_loaded_by_the_first_call_only():
    out = run_python("""
        import sys
        import torch
        import urm_kernels
        print("urm_kernels._cpu" in sys.modules)
        urm_kernels.score_topk(torch.ones(4), torch.ones(3, 4), 1)
        print("urm_kernels._cpu" in sys.modules)
    """)
    assert out.split() == ["False", "True"]
