// Ternary matrices on a CPU: a product from 2-bit weights, and the one that RSR makes from an index.
//
// Weights are -1, 0 or 1, one float scale for the whole matrix; activations and results are
// float32 or bfloat16, and sums are float32, so nothing but the weights is rounded. Written in
// the compilers' vector extensions, which become AVX2, AVX-512 or NEON by -march=native, and
// without torch's headers, so that one build serves every torch. lbi/kernels/ternary_ops.py
// says what the functions at the end take.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t WORD_COLUMNS = 128;  // 8 lanes of 16 weights each
constexpr int64_t BYTE_COLUMNS = 32;   // 8 lanes of 4 weights each, for the rest of a row
constexpr int64_t SERIAL = 1 << 16;    // multiplications below which a second thread costs more than it gives

using Floats = float __attribute__((vector_size(32), may_alias));
using Words = uint32_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(8)));

template <typename Vector>
Vector load(const void* from) {
    Vector loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

float total(Floats v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

float widen(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

uint16_t narrow(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffff) > 0x7f800000) return uint16_t(word >> 16) | 0x40;  // NaN stays NaN
    return uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);               // to the nearest, ties to even
}

float read(const void* values, int64_t at, bool bf16) {
    return bf16 ? widen(static_cast<const uint16_t*>(values)[at]) : static_cast<const float*>(values)[at];
}

void write(void* values, int64_t at, float value, bool bf16) {
    if (bf16) {
        static_cast<uint16_t*>(values)[at] = narrow(value);
    } else {
        static_cast<float*>(values)[at] = value;
    }
}

// A weight's two bits are 00, 01 or 11. Moved to the top of a float's they read 0, 2 or -2, so that one
// shift and one mask decode eight weights; the factor 2 is taken out of the scale.
constexpr uint32_t TOP = 0xC0000000u;

template <int Rows, int Inputs, int Weights>
inline __attribute__((always_inline)) void accumulate(
    const Words (&words)[Rows], const float* x, int64_t stride, Floats (&sums)[2][Rows][Inputs]) {
#pragma GCC unroll 16
    for (int weight = 0; weight < Weights; ++weight) {
        Floats inputs[Inputs];
        for (int input = 0; input < Inputs; ++input) {
            inputs[input] = load<Floats>(x + input * stride + weight * LANES);
        }
        for (int row = 0; row < Rows; ++row) {
            const Floats decoded = (Floats)((words[row] << (30 - 2 * weight)) & TOP);
            for (int input = 0; input < Inputs; ++input) {
                // Two sums in turn where there are few, or each addition would wait for the last.
                sums[Rows * Inputs < 8 ? weight % 2 : 0][row][input] += decoded * inputs[input];
            }
        }
    }
}

// Rows x Inputs dot products over `width` columns, a multiple of 32.
template <int Rows, int Inputs>
void dot_products(const uint8_t* packed, int64_t width, const float* x, float (&results)[Rows][Inputs]) {
    Floats sums[2][Rows][Inputs] = {};
    Words words[Rows];
    const int64_t row_bytes = width / 4;
    int64_t column = 0;
    for (; column + WORD_COLUMNS <= width; column += WORD_COLUMNS) {
        for (int row = 0; row < Rows; ++row) {
            const uint8_t* at = packed + row * row_bytes + column / 4;
            words[row] = load<Words>(at);
            // The rows of the next tile: the processor's own prefetch stops at the end of a page, and so of a tile.
            __builtin_prefetch(at + Rows * row_bytes);
        }
        accumulate<Rows, Inputs, 16>(words, x + column, width, sums);
    }
    for (; column < width; column += BYTE_COLUMNS) {
        for (int row = 0; row < Rows; ++row) {
            words[row] = __builtin_convertvector(load<Bytes>(packed + row * row_bytes + column / 4), Words);
        }
        accumulate<Rows, Inputs, 4>(words, x + column, width, sums);
    }
    for (int row = 0; row < Rows; ++row) {
        for (int input = 0; input < Inputs; ++input) {
            results[row][input] = total(sums[0][row][input] + sums[1][row][input]);
        }
    }
}

struct Product {
    const uint8_t* packed;
    const float* x;  // inputs x width, zero beyond the columns
    void* y;
    int64_t inputs, width, outputs;
    float scale;
    bool bf16;
};

template <int Rows, int Inputs>
void tile(const Product& p, int64_t row, int64_t input) {
    float results[Rows][Inputs];
    dot_products<Rows, Inputs>(p.packed + row * (p.width / 4), p.width, p.x + input * p.width, results);
    for (int r = 0; r < Rows; ++r) {
        for (int i = 0; i < Inputs; ++i) {
            write(p.y, (input + i) * p.outputs + row + r, p.scale * results[r][i], p.bf16);
        }
    }
}

template <int Rows>
void multiply_rows(const Product& p, int64_t row) {
    int64_t input = 0;
    // Four inputs share what is decoded for two rows: more would not fit in 16 registers.
    for (; input + 4 <= p.inputs; input += 4) {
        for (int64_t half = 0; half < Rows; half += 2) tile<Rows == 1 ? 1 : 2, 4>(p, row + half, input);
    }
    for (; input < p.inputs; ++input) tile<Rows, 1>(p, row, input);
}

// Redundant segment reduction. A block is `k` rows of the matrix; the k bits of a column there, in one sign's 0/1
// matrix, are its key. Columns of one key are added first, once, whatever number of rows they count for. The index
// of a block is a stream of 16-bit numbers, for each sign: length, count, and `count` times a key and the `length`
// columns that have it; the length 0 ends the sign. Segments in order of their length, because a branch that falls
// otherwise each time costs more than the additions it guards; the shortest have code of their own for the same end.
template <typename Value>
inline Value segment_sum(const Value* x, const uint16_t* columns, int length) {
    Value even = x[columns[0]], odd = {};
    for (int at = 1; at + 1 < length; at += 2) {
        odd += x[columns[at]];
        even += x[columns[at + 1]];
    }
    return length % 2 ? even + odd : even + odd + x[columns[length - 1]];
}

template <int Length, typename Value>
const uint16_t* add_segments(const uint16_t* stream, int length, int count, const Value* x, Value sign, Value* sums) {
    const int here = Length ? Length : length;
    for (int segment = 0; segment < count; ++segment, stream += 1 + here) {
        sums[*stream] += sign * segment_sum(x, stream + 1, here);
    }
    return stream;
}

template <typename Value>
const uint16_t* sums_of_sign(const uint16_t* stream, const Value* x, Value sign, Value* sums) {
    while (const int length = *stream++) {
        const int count = *stream++;
        switch (length) {
            case 1: stream = add_segments<1>(stream, length, count, x, sign, sums); break;
            case 2: stream = add_segments<2>(stream, length, count, x, sign, sums); break;
            case 3: stream = add_segments<3>(stream, length, count, x, sign, sums); break;
            case 4: stream = add_segments<4>(stream, length, count, x, sign, sums); break;
            case 5: stream = add_segments<5>(stream, length, count, x, sign, sums); break;
            case 6: stream = add_segments<6>(stream, length, count, x, sign, sums); break;
            case 7: stream = add_segments<7>(stream, length, count, x, sign, sums); break;
            case 8: stream = add_segments<8>(stream, length, count, x, sign, sums); break;
            default: stream = add_segments<0>(stream, length, count, x, sign, sums);
        }
    }
    return stream;
}

// RSR: each row adds the sums of the keys that have its bit, k 2^(k-1) additions.
template <typename Value>
void rows_by_table(const Value* sums, int k, Value* rows) {
    for (int bit = 0; bit < k; ++bit) {
        const int64_t run = int64_t(1) << bit;
        Value row = {};
        for (int64_t first = run; first < int64_t(1) << k; first += 2 * run) {
            for (int64_t key = first; key < first + run; ++key) row += sums[key];
        }
        rows[bit] = row;
    }
}

// RSR++: the highest bit's row is the sum of the upper half; folded onto the lower half, the next bit is the
// highest. 2^(k+1) additions.
template <typename Value>
void rows_by_folding(Value* sums, int k, Value* rows) {
    for (int bit = k - 1; bit >= 0; --bit) {
        const int64_t half = int64_t(1) << bit;
        Value row = {};
        for (int64_t key = 0; key < half; ++key) {
            row += sums[half + key];
            sums[key] += sums[half + key];
        }
        rows[bit] = row;
    }
}

struct RsrProduct {
    const void* x;
    void* y;
    const uint16_t* index;
    const int64_t* starts;  // of each block's stream
    float scale;
    int64_t inputs, columns, outputs;
    int k;
    bool fold, bf16;
    int threads;
};

// A block's rows for the inputs in `x`, one in each lane of a Value.
template <typename Value>
void multiply_block(const RsrProduct& p, int64_t block, const Value* x, Value* sums, Value* rows) {
    std::fill(sums, sums + (int64_t(1) << p.k), Value{});
    const uint16_t* negative = sums_of_sign(p.index + p.starts[block], x, Value{} + 1.0f, sums);
    sums_of_sign(negative, x, Value{} - 1.0f, sums);
    if (p.fold) {
        rows_by_folding(sums, p.k, rows);
    } else {
        rows_by_table(sums, p.k, rows);
    }
}

template <typename Value>
void write_block(const RsrProduct& p, int64_t block, int64_t first_input, const Value* rows) {
    constexpr int64_t lanes = sizeof(Value) / sizeof(float);
    const float* found = reinterpret_cast<const float*>(rows);
    for (int64_t lane = 0; lane < std::min(lanes, p.inputs - first_input); ++lane) {
        for (int64_t row = 0; row < std::min<int64_t>(p.k, p.outputs - block * p.k); ++row) {
            const int64_t at = (first_input + lane) * p.outputs + block * p.k + row;
            write(p.y, at, p.scale * found[row * lanes + lane], p.bf16);
        }
    }
}

// The inputs as float32, `lanes` of them side by side: tiles x columns x lanes.
template <typename Value>
std::vector<Value> tiled(const RsrProduct& p, int64_t tiles) {
    constexpr int64_t lanes = sizeof(Value) / sizeof(float);
    std::vector<Value> wide(tiles * p.columns);
    float* into = reinterpret_cast<float*>(wide.data());
    for (int64_t input = 0; input < p.inputs; ++input) {
        const int64_t first = input / lanes * p.columns * lanes + input % lanes;
        for (int64_t column = 0; column < p.columns; ++column) {
            into[first + column * lanes] = read(p.x, input * p.columns + column, p.bf16);
        }
    }
    return wide;
}

template <typename Value>
void multiply_by_index(const RsrProduct& p) {
    constexpr int64_t lanes = sizeof(Value) / sizeof(float);
    const int64_t tiles = (p.inputs + lanes - 1) / lanes, blocks = (p.outputs + p.k - 1) / p.k;
    const std::vector<Value> wide = tiled<Value>(p, tiles);
    const int threads = p.inputs * p.columns * p.outputs < SERIAL ? 1 : p.threads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Value> sums(int64_t(1) << p.k), rows(p.k);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                multiply_block(p, block, wide.data() + tile * p.columns, sums.data(), rows.data());
                write_block(p, block, tile * lanes, rows.data());
            }
        }
    }
}

}  // namespace

extern "C" {

void lbi_ternary_linear(const void* x, void* y, const uint8_t* packed, const float* scale, int64_t inputs,
                        int64_t columns, int64_t outputs, int bf16, int threads) {
    const int64_t width = (columns + BYTE_COLUMNS - 1) / BYTE_COLUMNS * BYTE_COLUMNS;
    std::vector<float> wide(inputs * width);
    for (int64_t input = 0; input < inputs; ++input) {
        for (int64_t column = 0; column < columns; ++column) {
            wide[input * width + column] = read(x, input * columns + column, bf16);
        }
    }
    const Product p{packed, wide.data(), y, inputs, width, outputs, *scale / 2, bf16 != 0};
    constexpr int64_t ROWS = 4;
    if (inputs * width * outputs < SERIAL) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < outputs; row += ROWS) {
        if (row + ROWS <= outputs) {
            multiply_rows<ROWS>(p, row);
        } else {
            for (int64_t last = row; last < outputs; ++last) multiply_rows<1>(p, last);
        }
    }
}

void lbi_rsr_linear(const void* x, void* y, const uint16_t* index, const int64_t* starts, const float* scale,
                    int64_t inputs, int64_t columns, int64_t outputs, int k, int fold, int bf16, int threads) {
    const RsrProduct p{x, y, index, starts, *scale, inputs, columns, outputs, k, fold != 0, bf16 != 0, threads};
    // One input is added as it is; more go eight at a time, whatever a column's number costs to read.
    if (inputs == 1) {
        multiply_by_index<float>(p);
    } else {
        multiply_by_index<Floats>(p);
    }
}

}  // extern "C"
