#!/bin/sh
# sanitizers.sh PYTHON SECONDS SEED: the C++ kernels under the compiler's sanitizers, on random shapes: 0 rows, 1 row, and
# addresses that XLA never gives. Half of the time is for addresses and undefined behaviour, half for threads. Each report
# is a fault, and so is a result that depends on the number of threads.
set -eu
python=$1 seconds=$2 seed=$3 here=$(dirname "$0") folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export LD_PRELOAD=""  # a sanitizer must be loaded first
# GCC does not align the stack that this option makes to registers of 64 bytes (its bug 110027).
export ASAN_OPTIONS=detect_stack_use_after_return=0 TSAN_OPTIONS=halt_on_error=1
words=$("$python" -c '
import jax
from dsv3_jax.kernels.cpu import library
flags = [flag for flag in library.FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
print(*flags, "-isystem", jax.ffi.include_dir(), *library.SOURCES)')
echo 'int main() {}' >"$folder/empty.cc"
for kind in address,undefined thread; do
  # -O1 compiles three times as long
  compiler="${CXX:-c++} -O0 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$kind -o $folder/program"
  if ! { $compiler "$folder/empty.cc" && "$folder/program"; } 2>/dev/null; then
    echo "sanitizers: $kind is left out: this machine's compiler does not have it"
    continue
  fi
  $compiler "$here/sanitized_kernels.cc" $words
  "$folder/program" "$seed" 0 "$((seconds / 2))" >"$folder/log" || { tail -3 "$folder/log"; exit 1; }
  echo "sanitizers: $kind: $(wc -l <"$folder/log") calls, no fault"
done
