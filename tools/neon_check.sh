#!/bin/sh
# Runs neon_check.c for ARM under qemu-user: plain ARMv8 and ARMv8.2 with dot products.
#
# CC: a compiler for aarch64 Linux (default: aarch64-linux-gnu-gcc, or zig's clang); QEMU: qemu-aarch64[-static].
set -eu
cd "$(dirname "$0")/.."
QEMU=${QEMU:-$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)}
if [ -z "${CC:-}" ]; then
    if command -v aarch64-linux-gnu-gcc >/dev/null; then CC=aarch64-linux-gnu-gcc
    elif command -v zig >/dev/null; then CC="zig cc -target aarch64-linux-musl"
    else echo "no compiler for aarch64: install gcc-aarch64-linux-gnu, or ziglang and set CC" >&2; exit 2
    fi
fi
[ -n "$QEMU" ] || { echo "no qemu-aarch64: install qemu-user or qemu-user-static, or set QEMU" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for target in ${TARGETS:--mcpu=generic -mcpu=generic+dotprod}; do
    echo "$target"
    for kernels in CHECK_FLOATS CHECK_QUANTIZED; do
        $CC -O2 -std=gnu11 -static -fno-math-errno -fno-trapping-math "$target" -D$kernels -I octavo/kernels/cpu \
            tools/neon_check.c -lm -o "$folder/check"
        "$QEMU" "$folder/check"
    done
done
