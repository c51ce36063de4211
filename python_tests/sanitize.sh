#!/bin/sh
# sanitize.sh KIND BIN: builds the CPU extension with -fsanitize=KIND beside the real one and runs on it the tests that
# call it; "thread": those of concurrency, with a minute of updates and reads.
set -eu
kind=$1
bin=$(cd "$2" && pwd)
top=$(cd "$(dirname "$0")/.." && pwd)
build=$top/build/sanitize-$kind

PATH=$bin:$PATH cmake -S "$top" -B "$build" -G Ninja -DURM_SANITIZE="$kind" -DURM_CUDA=OFF \
  -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$bin/python" >"$build.log" 2>&1 ||
  { cat "$build.log"; exit 1; }
PATH=$bin:$PATH cmake --build "$build"

# A copy of the package with the instrumented extension, found before the installed one.
rm -rf "$build/package"
mkdir -p "$build/package"
cp -r "$top/urm_kernels" "$build/package/"
rm -f "$build"/package/urm_kernels/_c*.so
cp "$build"/_cpu*.so "$build/package/urm_kernels/"

left_out=reference
files="bits values shapes gradients concurrency bounds candidates explore partition partition_gradients table_updates update_log"
files="$files codes code_attacks packed packed_changes blocks blocks_changes recall allowed_rows"
marked="not slow"
case $kind in
address)
  runtime=$(g++ -print-file-name=libasan.so)
  left_out="reference or fork_while or fork_in_the_middle"  # libasan's allocator may stay locked in such a child
  ;;
undefined) runtime=$(g++ -print-file-name=libubsan.so) ;;
thread)
  runtime=$(g++ -print-file-name=libtsan.so)
  # TSan ends a child whose parent has threads, and waits at exit, where torch aborts (CONTRACT.md)
  left_out="reference or fork or interpreter_exits or compiled or export or opcheck"
  files="concurrency table_updates update_log packed_changes"
  marked="slow or not slow"
  ;;
esac
# libstdc++ beside it: exceptions thrown across the extension need the interceptor to find the real one. The finder of the
# editable install, which would win over PYTHONPATH, is taken out, and the extension imported first: without it the tests
# would skip. What runs on the reference alone is left out. torch and its OpenMP are not instrumented: what they do among
# themselves looks like races to TSan and is none of ours.
cd "$build/package"
LD_PRELOAD="$runtime $(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=ignore_noninstrumented_modules=1 PYTHONPATH="$build/package" "$bin/python" -c '
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
import pytest
import urm_kernels._cpu
assert urm_kernels._cpu.__file__.startswith(sys.path[1]), urm_kernels._cpu.__file__
sys.exit(pytest.main(sys.argv[1:]))' \
  -q -p no:cacheprovider -c "$top/pyproject.toml" --rootdir "$top" -k "not ($left_out)" -m "$marked" \
  $(printf "$top/python_tests/test_%s.py " $files)
