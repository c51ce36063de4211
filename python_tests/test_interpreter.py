"""What triton_interpreter.py mends, and that it needs mending: without it, these results are wrong.

Runs where TRITON_INTERPRET=1 is set.
"""

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton
    import triton.language as tl
    import triton_interpreter
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    @triton.jit
    def multiply_add(x, y, z, out):
        at = tl.arange(0, 4)
        tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))

    @triton.jit
    def product(a, b, out):
        at = tl.arange(0, 16)
        square = at[:, None] * 16 + at[None, :]
        tl.store(out + square, tl.dot(tl.load(a + square), tl.load(b + square)))

    @triton.jit
    def there_and_back(x, wide, y, half, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(wide + at, tl.load(x + at).to(tl.float32))
        tl.store(half + at, tl.load(y + at).to(tl.bfloat16))

    @triton.jit
    def widen(x, wide, half):
        at = tl.arange(0, 256)
        values = tl.load(x + at)
        tl.store(wide + at, values.to(tl.float32))
        tl.store(half + at, values.to(tl.bfloat16))


@pytest.fixture(params=[True, False], ids=["mended", "as it comes"])
def mended(request, monkeypatch):
    if not request.param:
        for name, function in triton_interpreter.unmended.items():
            monkeypatch.setattr(InterpreterBuilder, name, function)
        monkeypatch.setattr(interpreter, "_convert_float", triton_interpreter.unmended_conversion)
    return request.param


def test_fma_rounds_once(mended):
    x = torch.full((4,), 1 + 2**-12)
    z = torch.full((4,), -1 - 2**-11)
    out = torch.empty(4)
    multiply_add[(1,)](x, x, z, out)
    assert (out == (2**-24 if mended else 0.0)).all()


def test_bfloat16_products(mended):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16)
    product[(1,)](a, b, out)
    assert torch.allclose(out, a.float() @ b.float(), atol=1e-4) == mended


def test_float8_values(mended):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wide, half = torch.empty(256), torch.empty(256, dtype=torch.bfloat16)
    widen[(1,)](values, wide, half)
    assert torch.equal(wide.nan_to_num(999), values.float().nan_to_num(999)) == mended
    assert torch.equal(half.float().nan_to_num(999), values.float().nan_to_num(999)) == mended


def test_bfloat16_values(mended):
    count = 1 << 16
    values = torch.arange(count, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    between = torch.cat([values[:-1].float() * 1.003, torch.tensor([259.0])])
    wide, half = torch.empty(count), torch.empty(count, dtype=torch.bfloat16)
    there_and_back[(1,)](values, wide, between, half, COUNT=count)
    assert torch.equal(wide.nan_to_num(9), values.float().nan_to_num(9)) == mended
    assert torch.equal(half.float().nan_to_num(9), between.bfloat16().float().nan_to_num(9)) == mended
