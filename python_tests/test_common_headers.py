"""csrc/common is for both compilers: nvcc takes every header, and kernels can call those of codes."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
KERNEL = """
__global__ void use(const char* block, float* out, uint8_t* row, urm::Rotation rotation) {
  out[0] = urm::code_error(128, urm::rotation_roundings(rotation)) + urm::kCodeUnderflow;
  out[1] = urm::value_of_half(urm::half_not_below(out[2])) * urm::rotation_factor(rotation);
  out[3] = urm::side_of_row(block, urm::block_code_bytes(128, 4), 3).scale;
  out[4] = static_cast<float>(urm::start_of_step(rotation, 1));
  urm::row_of_block(block, 3, 128, 4, row);
}
"""


def test_nvcc_compiles_the_common_headers(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc on PATH")
    headers = "".join(f'#include "common/{header.name}"\n' for header in sorted(SOURCES.glob("common/*.h")))
    (tmp_path / "use.cu").write_text(headers + KERNEL)
    command = [
        nvcc,
        "-std=c++17",
        "-arch=sm_90",
        "--Werror=all-warnings",
        f"-I{SOURCES}",
        "-c",
        "use.cu",
        "-o",
        "use.o",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
