#version 460
#extension GL_GOOGLE_include_directive : require
#include "hmm_svm.glsl"
// y[i] = a * x[i] + y[i]. Sixteen elements an invocation: they are translated together.

SVM_ARGS {
    uint64_t x;
    uint64_t y;
    uint64_t count;
    float a;
};

void main() {
    if (!svm_begin()) return;
    uint64_t first = 16 * uint64_t(svm_invocation());
    if (first >= svm_args.count) return;
    uint n = uint(min(svm_args.count - first, uint64_t(16)));
    uint64_t from = svm_args.x + 4 * first, to = svm_args.y + 4 * first;
    SvmSpan x = svm_read(from, 4 * n), y = svm_write(to, 4 * n);
    if (!svm_commit()) return;
    float a = svm_args.a;
    for (uint i = 0; i < n; i++) {
        float value = a * svm_load_float(x, from + 4 * i) + svm_load_float(y, to + 4 * i);
        svm_store_float(y, to + 4 * i, value);
    }
}
