// The hash by which SET grows, of many places at once: a loop of its own, which compilers turn into vectors.

inline void hash_keys(uint64_t start, uint64_t first, int count, uint32_t* keys) {
    for (int i = 0; i < count; i++) keys[i] = grow_key_by_hash(start, first + uint64_t(i));
}
