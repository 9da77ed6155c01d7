#version 460
#extension GL_GOOGLE_include_directive : require
#include "hmm_svm.glsl"
// Each invocation of the first group adds up a word of each of so many pages, all of which it needs at once.

SVM_ARGS {
    uint64_t words;
    uint64_t sums;
    uint pages;
};

void main() {
    if (!svm_begin()) return;
    uint sum = 0;
    for (uint i = 0; i < svm_args.pages; i++) sum += svm_load_uint(svm_args.words + 4096 * uint64_t(i) + 4 * svm_invocation());
    uint64_t to = svm_args.sums + 4 * svm_invocation();
    SvmSpan span = svm_write(to, 4);
    if (!svm_commit()) return;
    svm_store_uint(span, to, sum);
}
