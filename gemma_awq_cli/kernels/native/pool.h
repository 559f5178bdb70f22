// Worker threads that wait by spinning for a moment before they sleep: a token has about a hundred parallel steps of
// ten microseconds each, too short to wake a sleeping thread for.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        stop_ = true;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
    }
    int threads() const { return threads_; }

    // Calls body(item, thread) for every item in 0 .. items - 1, in any order, on all threads; returns when all have
    // returned.
    template <class Body> void run(int64_t items, const Body& body) {
        if (threads_ == 1 || items <= 1) {
            for (int64_t i = 0; i < items; i++) body(i, 0);
            return;
        }
        done_.store(0, std::memory_order_relaxed);
        call_.store([](const void* b, int64_t i, int t) { (*static_cast<const Body*>(b))(i, t); },
                    std::memory_order_relaxed);
        body_.store(&body, std::memory_order_relaxed);
        items_.store(items, std::memory_order_relaxed);
        epoch_++;
        state_.store((epoch_ << 32) | (uint64_t)items);  // sequentially consistent against sleepers_
        if (sleepers_.load()) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        take(0);
        for (int spins = 0; done_.load(std::memory_order_acquire) != items; spins++) pause(spins);
    }

  private:
    typedef void (*Call)(const void*, int64_t, int);

    // What a thread read about the step is valid only once it has claimed an item: the claim proves that the step is
    // open.
    void take(int thread) {
        uint64_t state = state_.load(std::memory_order_acquire);
        while ((uint32_t)state) {
            const Call call = call_.load(std::memory_order_relaxed);
            const void* body = body_.load(std::memory_order_relaxed);
            const int64_t items = items_.load(std::memory_order_relaxed);
            if (state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel)) {
                call(body, items - (int64_t)(uint32_t)state, thread);
                done_.fetch_add(1, std::memory_order_release);
                state = state_.load(std::memory_order_acquire);
            }
        }
    }
    void work(int thread) {
        while (!stop_) {
            take(thread);
            const auto start = std::chrono::steady_clock::now();
            for (int spins = 1; !(uint32_t)state_.load(std::memory_order_acquire); spins++) {
                pause(spins);
                if (spins % 64 == 0 && std::chrono::steady_clock::now() - start > std::chrono::microseconds(400)) {
                    std::unique_lock<std::mutex> lock(mutex_);
                    sleepers_++;
                    wake_.wait(lock, [this] { return stop_ || (uint32_t)state_.load(); });
                    sleepers_--;
                    break;
                }
            }
        }
    }
    static void pause(int spins) {
        if (spins % 1024 == 1023) std::this_thread::yield();
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint64_t> state_{0};  // number of the step << 32 | items that are not claimed yet
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> body_{nullptr};
    std::atomic<int64_t> items_{0};
    uint64_t epoch_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_;
};
