/* Intrinsics of x86. For targets without AVX-512 only those up to AVX2: immintrin.h has all that the compiler knows, which
 * costs every file a third of a second.
 */
#ifndef OCTAVO_X86_H
#define OCTAVO_X86_H

#if defined(__GNUC__) && !defined(__clang__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#define _IMMINTRIN_H_INCLUDED
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <fmaintrin.h>
#include <f16cintrin.h>
#else
#include <immintrin.h>
#endif

#endif
