#version 460
#extension GL_GOOGLE_include_directive : require
#define SVM_SAVES
#include "hmm_svm.glsl"
// For each head of a list of { next, value }: the sum of its values, wrapping around. A walk that misses goes on where it was.

SVM_ARGS {
    uint64_t heads;
    uint64_t sums;
    uint64_t count;
};

void main() {
    if (!svm_begin()) return;
    uint64_t i = svm_invocation();
    if (i >= svm_args.count) return;
    uint64_t node = 0, sum = 0;
    if (!svm_restore(node, sum)) node = svm_load_uint64(svm_args.heads + 8 * i);
    if (svm_missed()) return;
    while (node != 0) {
        uint64_t next = svm_load_uint64(node), value = svm_load_uint64(node + 8);
        if (svm_missed()) break;
        node = next;
        sum += value;
    }
    svm_save(node, sum);
    SvmSpan to = svm_write(svm_args.sums + 8 * i, 8);
    if (!svm_commit()) return;
    svm_store_uint64(to, svm_args.sums + 8 * i, sum);
}
