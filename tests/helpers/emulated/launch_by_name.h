// Launches of emulated kernels by their names, with arguments of 8 bytes each as prepared launches pass them; and
// constants of their sources, by the text of an expression.
#pragma once
#include <map>
#include <string>
#include <utility>

struct ByWords {
    int num_words;
    std::function<void(const uint64_t*)> run;
};

template <typename T>
T from_word(uint64_t word) {
    static_assert(sizeof(T) == 8, "an argument of a kernel is an address or an int64");
    T value;
    std::memcpy(&value, &word, 8);
    return value;
}
template <typename... Arguments, size_t... I>
void run_with(void (*kernel)(Arguments...), const uint64_t* words, std::index_sequence<I...>) {
    kernel(from_word<Arguments>(words[I])...);
}
template <typename... Arguments>
ByWords by_words(void (*kernel)(Arguments...)) {
    const auto run = [kernel](const uint64_t* words) {
        run_with(kernel, words, std::index_sequence_for<Arguments...>());
    };
    return {sizeof...(Arguments), run};
}

// 0, or 1 where no kernel has this name and this number of arguments.
inline int launch_by_name(
    const std::map<std::string, ByWords>& kernels, const char* name, int blocks, int threads, int shared,
    const uint64_t* words, int num_words
) {
    const auto found = kernels.find(name);
    if (found == kernels.end() || found->second.num_words != num_words) return 1;
    emulated::dynamic_bytes = unsigned(shared);
    emulated::launch([&] { found->second.run(words); }, blocks, threads);
    return 0;
}

#define CONSTANT(...) {#__VA_ARGS__, int64_t(__VA_ARGS__)}

// Of a kernel's source; -1 where it is not listed.
inline int64_t constant_by_text(const std::map<std::string, int64_t>& constants, const char* text) {
    const auto found = constants.find(text);
    return found == constants.end() ? -1 : found->second;
}
