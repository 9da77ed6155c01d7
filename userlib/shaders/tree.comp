#version 460
#extension GL_GOOGLE_include_directive : require
#include "hmm_svm.glsl"
// Looks keys up in a binary search tree of { left, right, key, value }: the value, or all bits set.

SVM_ARGS {
    uint64_t root;
    uint64_t keys;
    uint64_t values;
    uint64_t count;
};

void main() {
    if (!svm_begin()) return;
    uint64_t i = svm_invocation();
    if (i >= svm_args.count) return;
    SvmSpan to = svm_write(svm_args.values + 8 * i, 8);
    uint64_t key = svm_load_uint64(svm_args.keys + 8 * i), found = ~uint64_t(0), node = svm_args.root;
    while (node != 0) {
        uint64_t here = svm_load_uint64(node + 16);
        if (here == key) {
            found = svm_load_uint64(node + 24);
            break;
        }
        node = svm_load_uint64(node + (key < here ? 0 : 8));
        if (svm_missed()) break;
    }
    if (!svm_commit()) return;
    svm_store_uint64(to, svm_args.values + 8 * i, found);
}
