#version 460
#extension GL_GOOGLE_include_directive : require
#include "hmm_svm.glsl"
// Counts words by their lowest eight bits, with atomics. Sixteen an invocation.

SVM_ARGS {
    uint64_t words;
    uint64_t counts; // 256 of 32 bits
    uint64_t count;
};

void main() {
    if (!svm_begin()) return;
    uint64_t first = 16 * uint64_t(svm_invocation());
    if (first >= svm_args.count) return;
    uint n = uint(min(svm_args.count - first, uint64_t(16)));
    uint64_t from = svm_args.words + 4 * first;
    SvmSpan words = svm_read(from, 4 * n), counts = svm_write(svm_args.counts, 1024);
    if (!svm_commit()) return;
    for (uint i = 0; i < n; i++) {
        uint bin = svm_load_uint(words, from + 4 * i) & 255;
        svm_add_uint(counts, svm_args.counts + 4 * bin, 1);
    }
}
