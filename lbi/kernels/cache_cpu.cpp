// A low-bit cache of keys and values on a CPU: one token put into it, and one token's attention over it.
//
// Rows are read as they are stored and widened one at a time into registers and the first-level
// cache; nothing of the cache is ever written out in full. lbi/kernels/cache_formats.py has the
// layout and the arithmetic, which `lbi_cache_put` repeats bit by bit; lbi/kernels/cache_ops.py
// says what the two functions take. Written without torch's headers, so that one build serves
// every torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t BLOCK = 32;  // slots between two looks at the largest score
enum Format : int64_t { INT8, FP8, INT4 };

using Floats = float __attribute__((vector_size(32), may_alias));

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

uint8_t to_fp8(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    const uint8_t sign = uint8_t(word >> 24) & 0x80;
    const float size = std::fabs(value);
    if (size < 0.015625f) return sign | uint8_t(std::nearbyint(size * 512.0f));  // steps of 2^-9; 8 is 2^-6
    word &= 0x7fffffff;
    word += 0x7ffff + ((word >> 20) & 1);
    return sign | uint8_t((word >> 20) - ((127 - 7) << 3));
}

float from_fp8(uint8_t code) {
    // Sign, exponent and mantissa at float32's places; the factor mends the exponent's bias, also of subnormals.
    const uint32_t word = uint32_t(code & 0x80) << 24 | uint32_t(code & 0x7f) << 20;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value * 0x1p120f;
}

void read_row(
    const uint8_t* __restrict codes, const uint16_t* __restrict numbers, float* __restrict out, int64_t width,
    int64_t group, int64_t format
) {
    if (format == INT4) {
        const int64_t half = width / 2, groups = width / group;
        for (int64_t i = 0; i < half; ++i) {
            out[i] = float(codes[i] & 15);
            out[i + half] = float(codes[i] >> 4);
        }
        for (int64_t g = 0; g < groups; ++g) {
            const float scale = widen(numbers[g]), low = widen(numbers[groups + g]);
            for (int64_t i = g * group; i < (g + 1) * group; ++i) out[i] = out[i] * scale + low;
        }
        return;
    }
    for (int64_t g = 0; g < width / group; ++g) {
        const float scale = widen(numbers[g]);
        if (format == INT8) {
            for (int64_t i = g * group; i < (g + 1) * group; ++i) out[i] = float(int8_t(codes[i])) * scale;
        } else {
            for (int64_t i = g * group; i < (g + 1) * group; ++i) out[i] = from_fp8(codes[i]) * scale;
        }
    }
}

void store_row(const float* values, uint8_t* codes, uint16_t* numbers, int64_t width, int64_t group, int64_t format) {
    const int64_t groups = width / group, half = width / 2;
    if (format == INT4) std::fill(codes, codes + half, 0);
    for (int64_t g = 0; g < groups; ++g) {
        const float* part = values + g * group;
        float most = -std::numeric_limits<float>::infinity(), least = -most, size = 0;
        for (int64_t i = 0; i < group; ++i) {
            most = std::max(most, part[i]);
            least = std::min(least, part[i]);
            size = std::max(size, std::fabs(part[i]));
        }
        if (format == INT4) {
            numbers[groups + g] = narrow(least);
            least = widen(numbers[groups + g]);
            numbers[g] = narrow(std::max(0.0f, (most - least) / 15.0f));
        } else {
            numbers[g] = narrow(size / (format == INT8 ? 127.0f : 448.0f));
        }
        const float scale = widen(numbers[g]);
        for (int64_t i = 0; i < group; ++i) {
            const int64_t at = g * group + i;
            if (format == INT4) {
                const float code = scale == 0 ? 0 : std::nearbyint((part[i] - least) / scale);
                const uint8_t bits = uint8_t(std::clamp(code, 0.0f, 15.0f));
                codes[at < half ? at : at - half] |= at < half ? bits : uint8_t(bits << 4);
            } else if (format == INT8) {
                const float code = scale == 0 ? 0 : std::clamp(part[i] / scale, -127.0f, 127.0f);
                codes[at] = uint8_t(int8_t(std::nearbyint(code)));
            } else {
                codes[at] = to_fp8(scale == 0 ? 0 : std::clamp(part[i] / scale, -448.0f, 448.0f));
            }
        }
    }
}

float total(const Floats& v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

float product(const Floats* __restrict x, const Floats* __restrict y, int64_t vectors) {
    Floats even = {}, odd = {};
    int64_t v = 0;
    for (; v + 1 < vectors; v += 2) {
        even += x[v] * y[v];
        odd += x[v + 1] * y[v + 1];
    }
    if (v < vectors) even += x[v] * y[v];
    return total(even + odd);
}

// acc += weighted rows, some registers of each row at a time.
void add_weighted(
    Floats* __restrict acc, const Floats* __restrict rows, const float* __restrict weights, int64_t size,
    int64_t vectors
) {
    int64_t v = 0;
    for (; v + 3 < vectors; v += 4) {
        Floats a = acc[v], b = acc[v + 1], c = acc[v + 2], d = acc[v + 3];
        for (int64_t t = 0; t < size; ++t) {
            const Floats* row = rows + t * vectors + v;
            a += weights[t] * row[0];
            b += weights[t] * row[1];
            c += weights[t] * row[2];
            d += weights[t] * row[3];
        }
        acc[v] = a, acc[v + 1] = b, acc[v + 2] = c, acc[v + 3] = d;
    }
    for (; v < vectors; ++v)
        for (int64_t t = 0; t < size; ++t) acc[v] += weights[t] * rows[t * vectors + v];
}

}  // namespace

extern "C" {

void lbi_cache_put(
    const float* values, uint8_t* codes, uint16_t* numbers, int64_t heads, int64_t width, int64_t slots, int64_t at,
    int64_t code_bytes, int64_t count, int64_t group, int64_t format
) {
    for (int64_t head = 0; head < heads; ++head) {
        const int64_t row = head * slots + at;
        store_row(values + head * width, codes + row * code_bytes, numbers + row * count, width, group, format);
    }
}

// One part of one head's live slots, for all of its queries: sums of weighted values, largest score, sum of weights.
static void attend_part(
    const float* queries, const uint8_t* kc, const uint16_t* kn, const uint8_t* vc, const uint16_t* vn, float* partial,
    int64_t share, int64_t width, int64_t first, int64_t last, int64_t code_bytes, int64_t count, int64_t group,
    int64_t format
) {
    const int64_t vectors = (width + LANES - 1) / LANES, padded = vectors * LANES;
    std::vector<Floats> rows(BLOCK * vectors), q(share * vectors), acc(share * vectors);
    float* flat = reinterpret_cast<float*>(rows.data());
    for (int64_t h = 0; h < share; ++h)
        std::memcpy(reinterpret_cast<float*>(q.data()) + h * padded, queries + h * width, width * sizeof(float));
    std::vector<float> most(share, -std::numeric_limits<float>::infinity()), sum(share, 0.0f), weight(share * BLOCK);
    for (int64_t start = first; start < last; start += BLOCK) {
        const int64_t size = std::min(BLOCK, last - start);
        for (int64_t t = 0; t < size; ++t)
            read_row(kc + (start + t) * code_bytes, kn + (start + t) * count, flat + t * padded, width, group, format);
        for (int64_t h = 0; h < share; ++h) {
            float* __restrict scores = weight.data() + h * BLOCK;
            for (int64_t t = 0; t < size; ++t) scores[t] = product(&q[h * vectors], &rows[t * vectors], vectors);
            const float higher = std::max(most[h], *std::max_element(scores, scores + size));
            const float shrink = std::exp(most[h] - higher);
            sum[h] *= shrink;
            for (int64_t t = 0; t < size; ++t) sum[h] += scores[t] = std::exp(scores[t] - higher);
            for (int64_t v = 0; v < vectors; ++v) acc[h * vectors + v] *= shrink;
            most[h] = higher;
        }
        for (int64_t t = 0; t < size; ++t)
            read_row(vc + (start + t) * code_bytes, vn + (start + t) * count, flat + t * padded, width, group, format);
        for (int64_t h = 0; h < share; ++h)
            add_weighted(&acc[h * vectors], rows.data(), weight.data() + h * BLOCK, size, vectors);
    }
    for (int64_t h = 0; h < share; ++h) {
        float* mine = partial + h * (width + 2);
        std::memcpy(mine, reinterpret_cast<float*>(acc.data()) + h * padded, width * sizeof(float));
        mine[width] = most[h];
        mine[width + 1] = sum[h];
    }
}

void lbi_cache_attend(
    const float* queries, const uint8_t* kc, const uint16_t* kn, const uint8_t* vc, const uint16_t* vn, float* out,
    int64_t heads, int64_t kv_heads, int64_t width, int64_t slots, int64_t live, int64_t code_bytes, int64_t count,
    int64_t group, int64_t format, int threads
) {
    const int64_t share = heads / kv_heads, size = share * (width + 2);
    // Twice as many parts as threads, that none waits long for another; none with less than a few blocks.
    const int64_t wanted = threads == 1 ? 1 : (2 * threads + kv_heads - 1) / kv_heads;
    const int64_t parts = std::clamp<int64_t>(live / (4 * BLOCK), 1, wanted), step = (live + parts - 1) / parts;
    std::vector<float> partial(kv_heads * parts * size);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && live * width * heads > (1 << 16))
    for (int64_t item = 0; item < kv_heads * parts; ++item) {
        const int64_t head = item / parts, first = item % parts * step, row = head * slots;
        attend_part(
            queries + head * share * width, kc + row * code_bytes, kn + row * count, vc + row * code_bytes,
            vn + row * count, partial.data() + item * size, share, width, first, std::min(first + step, live),
            code_bytes, count, group, format
        );
    }
    for (int64_t h = 0; h < heads; ++h) {
        const float* mine = partial.data() + h / share * parts * size + h % share * (width + 2);
        float most = mine[width], sum = 0;
        for (int64_t part = 1; part < parts; ++part) most = std::max(most, mine[part * size + width]);
        std::fill(out + h * width, out + (h + 1) * width, 0.0f);
        for (int64_t part = 0; part < parts; ++part) {
            const float* its = mine + part * size;
            const float weight = std::exp(its[width] - most);
            sum += its[width + 1] * weight;
            for (int64_t i = 0; i < width; ++i) out[h * width + i] += its[i] * weight;
        }
        for (int64_t i = 0; i < width; ++i) out[h * width + i] /= sum;
    }
}
}
