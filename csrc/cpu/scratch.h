// Scratch memory that is kept between calls: a fresh buffer of a megabyte costs more in page faults than in arithmetic.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace sparsekern {

// Grows, never shrinks. Make it thread_local: then calls from several Python threads do not share it.
template <class T>
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data); }

    // Contents are lost whenever it grows.
    T* get(size_t count) {
        if (count > capacity) {
            std::free(data);
            size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
            data = static_cast<T*>(std::aligned_alloc(64, bytes));
            capacity = data ? bytes / sizeof(T) : 0;
            if (!data) throw std::bad_alloc();
        }
        return data;
    }

private:
    T* data = nullptr;
    size_t capacity = 0;
};

}  // namespace sparsekern
