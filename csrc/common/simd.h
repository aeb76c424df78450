// SPDX-License-Identifier: Apache-2.0
// A small vector type, in the form of the instruction set this file is compiled for: F32 holds
// kLanes floats, I32 as many int32, F64 half as many doubles, M32 one truth value per lane.
// Kernels written on it know no intrinsic. load_first reads `count` elements, at most a vector's,
// and fills the rest with zeros; it touches no memory behind them. load_quads puts p[0..3],
// p[stride..stride + 3], ... side by side, and transpose_quads exchanges, in every quad of lanes,
// vector and lane: together they transpose a matrix of kLanes rows four columns at a time.
//
// load_bf16 and load_f16 read a vector's elements in those formats, and are exact;
// store_high_words writes the upper half of every lane, store_f16 rounds to nearest even.
//
// reduce_add_each reduces as many vectors of doubles as one has lanes, each in the order of
// reduce_add, or of floats, and reduce_max_each as many of integers; keep_first takes the lanes
// from `count` on out of `rest`. store_chosen writes the lanes that are set in a mask side by side
// and returns their number; it may write a whole vector.
//
// join_words and join_bytes put the low halves or bytes of their operands side by side in every
// lane, the first lowest; with_low_byte puts the lowest byte of `b` in the place of that of `a`.
// dot_words adds to every lane of a sum the two products of the signed 16-bit numbers in it,
// dot_bytes the four products of its unsigned bytes `a` and signed bytes `b`. AVX-512 VNNI has an
// instruction for it; elsewhere the products of two neighbours are first added up in 16 bits, so
// bytes of `a` may not exceed kLargestByte, nor those of `b` +-127.
//
// With AVX-512 BF16, pair_words puts 16 words of `a` and of `b` side by side in every lane, a's
// lowest, and load_words_first reads up to 32 words; dot_bf16 adds to every lane of a sum the two
// products of the bfloat16 in it, and relu_bf16 takes the maximum with 0, or the NaN. join_bf16
// rounds a and b to the nearest bfloat16 and puts a's below b's in every lane; exp2_coarse is 2^a
// for a <= 0 with a relative error below 8e-5, enough for what is rounded to bfloat16 after. With
// AVX-512 VBMI, exp2_words is 2^x in bfloat16 with a relative error below 2^-7 (rounding alone:
// 2^-8), for a and b that are 512 (x + 127) + 2 and x <= 0; below 2 and for NaN it is 0. Of every
// eight words side by side four are a's and four b's.
// sub_words, max_words and what else ends so take 32 unsigned numbers of 16 bits.
//
// multiply_even multiplies the unsigned numbers of the even lanes and puts the low halves of the
// products there, the high halves into the lanes that follow; odd_to_even moves the odd lanes to
// the even ones, interleave_even puts the even lanes of two vectors side by side, and part_pairs
// those of a pair of lanes of `a` and of `b`: of every four lanes the first pair goes to `first`.
// shift_right fills with zeros, shift_right_signed with the sign; as_i32 and as_f32 keep the bits;
// bit_xor of three and bit_and_or, (a & b) | c, are one instruction in AVX-512. multiply_add may
// round a product, fused_multiply_add never does.
//
// min and max give `b` where either operand is a NaN. within is a where that lies in
// [-limit, limit], else its nearer end, and one of the three where a is a NaN.
//
// take gives every lane that lane of `a` which `index` says there, modulo kLanes; take_each looks
// up tables of 32, aligned, modulo 32, fastest where all indices are at least 24. stream is a store
// to a multiple of the vector's size that leaves the caches alone, if there is an instruction for
// it; between streams and anything that tells another thread of them there must be a stream_fence.
//
// The scalar form is four lanes of compiler vectors, which any processor's baseline (SSE2, NEON)
// carries.
#pragma once

#if defined(__AVX512F__)
#include "common/simd_avx512.h"
#elif defined(__AVX2__)
#include "common/simd_avx2.h"
#else
#include "common/simd_scalar.h"
#endif
