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
             std::size_t index_bytes, std::size_t channels)
        : keys(bytes(keys), bytes(keys) + key_bytes), index(bytes(index), bytes(index) + index_bytes), scale(scale),
          shift(shift), channels(channels), backend(wanted_backend()) {}

    // Whether they are as they were, and scale and shift finite.
    bool holds(const void* keys, const void* index, const float* scale, const float* shift) const {
        return scale == this->scale && shift == this->shift &&
               std::memcmp(this->keys.data(), keys, this->keys.size()) == 0 &&
               std::memcmp(this->index.data(), index, this->index.size()) == 0 &&
               all_finite(scale, channels) && all_finite(shift, channels) && backend == wanted_backend();
    }

private:
    std::vector<char> keys, index;
    const float *scale, *shift;
    std::size_t channels;
    std::string backend;

    static const char* bytes(const void* memory) { return static_cast<const char*>(memory); }

    static const char* wanted_backend() {
        const char* const name = std::getenv("MKF_BACKEND");
        return name == nullptr ? "" : name;
    }
};

}  // namespace mkf
