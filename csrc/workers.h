// Threads that share the work, without torch.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

// The threads that share the work: `run(body)` calls body() `count` times, on as many threads as there are.
struct Workers {
  int count;
  std::function<void(const std::function<void()>& body)> run;
};

// Calls work(i) once for every i in [0, items). Threads take `group` items at a time, so that they finish together
// although some are slowed by a neighbour; one group stays on the calling thread.
template <class Work>
void share_out(const Workers& workers, int64_t items, int64_t group, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto body = [&] {
    for (int64_t first; (first = next.fetch_add(group, std::memory_order_relaxed)) < items;) {
      for (int64_t item = first; item < items && item < first + group; ++item) work(item);
    }
  };
  if (workers.count == 1 || items <= group) {
    body();
  } else {
    workers.run(body);
  }
}
