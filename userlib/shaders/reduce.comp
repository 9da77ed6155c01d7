#version 460
#extension GL_GOOGLE_include_directive : require
#define SVM_ATOMIC64
#include "hmm_svm.glsl"
// Adds up words to one of 64 bits. Sixteen an invocation, and one atomic for them.

SVM_ARGS {
    uint64_t words;
    uint64_t sum;
    uint64_t count;
};

void main() {
    if (!svm_begin()) return;
    uint64_t first = 16 * uint64_t(svm_invocation());
    if (first >= svm_args.count) return;
    uint n = uint(min(svm_args.count - first, uint64_t(16)));
    uint64_t from = svm_args.words + 4 * first;
    SvmSpan words = svm_read(from, 4 * n), sum = svm_write(svm_args.sum, 8);
    if (!svm_commit()) return;
    uint64_t part = 0;
    for (uint i = 0; i < n; i++) part += svm_load_uint(words, from + 4 * i);
    svm_add_uint64(sum, svm_args.sum, part);
}
