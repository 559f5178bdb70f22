// Experts: a router sends every token to a few of many small MLPs. Tokens are sorted by expert, so that each weight is
// read once, and only those of experts that got a token.
#pragma once

#include "norm.h"
#include "specs.h"

struct ExpertBuffers {
    std::vector<float> scores, weight, x, scale, total, gate_up, act, act_scale, act_total, down;
    std::vector<int8_t> q, act_q;
    std::vector<int64_t> chosen, place, first;
    std::vector<Product> products;
};

// The experts with the largest scores [count], and what their results are multiplied by: their probabilities, as shares
// of the chosen ones', times each expert's own scale.
static void choose_experts(const ExpertsSpec& e, const float* scores, int64_t* chosen, float* weight) {
    for (int64_t k = 0; k < e.active; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < e.count; i++) {
            if (std::find(chosen, chosen + k, i) != chosen + k) continue;
            if (best < 0 || scores[i] > scores[best]) best = i;
        }
        chosen[k] = best;
    }
    float total = 0;
    for (int64_t k = 0; k < e.active; k++) total += weight[k] = std::exp(scores[chosen[k]] - scores[chosen[0]]);
    for (int64_t k = 0; k < e.active; k++) weight[k] *= e.scale[chosen[k]] / total;
}

// place[i]: the row of choice i when all choices are sorted by expert, those of one expert in their order; first[e]: the
// first row of expert e, first[count] the end.
static void sort_by_expert(const std::vector<int64_t>& chosen, int64_t choices, int64_t count, std::vector<int64_t>& first,
                           std::vector<int64_t>& place) {
    first.assign(count + 1, 0);
    for (int64_t i = 0; i < choices; i++) first[chosen[i] + 1]++;
    for (int64_t e = 0; e < count; e++) first[e + 1] += first[e];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < choices; i++) place[i] = next[chosen[i]]++;
}
