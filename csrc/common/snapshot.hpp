// What a call that was checked and prepared once depends on, so that the next one need not be.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace mkf {

inline bool all_finite(const float* values, std::size_t count) {
    constexpr std::uint32_t exponent = 0x7f800000;
    std::uint32_t any = 0;
    for (std::size_t i = 0; i < count; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        any |= (bits & exponent) == exponent;
    }
    return any == 0;
}

// The bytes of keys and index, where scale and shift lie, the number of channels, and the implementation that the
// environment asked for.
class Snapshot {
public:
    Snapshot(const void* keys, const void* index, const float* scale, const float* shift, std::size_t key_bytes,
             std::size_t channels)
        : keys(key_bytes), index(channels), scale(scale), shift(shift), backend(wanted_backend()) {
        std::memcpy(this->keys.data(), keys, key_bytes);
        std::memcpy(this->index.data(), index, channels * sizeof(std::int32_t));
    }

    // Whether they are as they were, and scale and shift finite.
    bool holds(const void* keys, const void* index, const float* scale, const float* shift) const {
        const std::size_t channels = this->index.size();
        return scale == this->scale && shift == this->shift &&
               std::memcmp(this->keys.data(), keys, this->keys.size()) == 0 &&
               std::memcmp(this->index.data(), index, channels * sizeof(std::int32_t)) == 0 &&
               all_finite(scale, channels) && all_finite(shift, channels) && backend == wanted_backend();
    }

private:
    std::vector<char> keys;
    std::vector<std::int32_t> index;
    const float *scale, *shift;
    std::string backend;

    static const char* wanted_backend() {
        const char* const name = std::getenv("MKF_BACKEND");
        return name == nullptr ? "" : name;
    }
};

}  // namespace mkf
