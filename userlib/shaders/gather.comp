#version 460
#extension GL_GOOGLE_include_directive : require
#include "hmm_svm.glsl"
// to[i] = from[index[i]], or 0 where there is no such element.

SVM_ARGS {
    uint64_t from;
    uint64_t index;
    uint64_t to;
    uint64_t count;
    uint64_t elements;
};

void main() {
    if (!svm_begin()) return;
    uint64_t i = svm_invocation();
    if (i >= svm_args.count) return;
    SvmSpan to = svm_write(svm_args.to + 4 * i, 4);
    uint64_t index = svm_load_uint(svm_args.index + 4 * i);
    uint value = 0;
    if (index < svm_args.elements) value = svm_load_uint(svm_args.from + 4 * index);
    if (!svm_commit()) return;
    svm_store_uint(to, svm_args.to + 4 * i, value);
}
