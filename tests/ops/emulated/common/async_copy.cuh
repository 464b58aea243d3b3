// Copies arrive when they are waited for, no sooner.
#pragma once
#include "common/types.cuh"
inline void copy_async(u32 to, const void* from) { fibers[threadIdx.x].open.push_back({to, from}); }
inline void copy_async_commit() {
    Fiber& me = fibers[threadIdx.x];
    me.committed.push_back(std::move(me.open));
    me.open.clear();
}
template <int kPending>
void copy_async_wait() {
    for (auto& groups = fibers[threadIdx.x].committed; groups.size() > kPending; groups.pop_front())
        for (const Copy& copy : groups.front()) std::memcpy(pipeline + copy.to, copy.from, 16);
}
inline Vec16 load_once(const u8* p) { return *reinterpret_cast<const Vec16*>(p); }
inline void load_two(u32 (&words)[2], const u8* p) { std::memcpy(words, p, 8); }
inline float4 load_published(const float4* p) { return *p; }
inline u32 arrive(u32* counter) { return (*counter)++; }
inline u32 peek(const u32* counter) { return *counter; }
