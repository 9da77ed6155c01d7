#version 460
#extension GL_GOOGLE_include_directive : require
#include "hmm_svm.glsl"
// Does one thing that a shader must not.

SVM_ARGS {
    uint64_t words; // at least 16
    uint what;
};

void main() {
    if (!svm_begin()) return;
    uint64_t words = svm_args.words;
    SvmSpan write = svm_write(words, 16), read = svm_read(words + 16, 16);
    if (svm_args.what == 0) svm_store_uint(write, words, 1);
    if (svm_args.what == 4) svm_write(words, 4097);
    if (svm_args.what == 5) svm_load_uint(uint64_t(8));
    if (!svm_commit()) return;
    if (svm_args.what == 1) svm_store_uint(write, words + 13, 1);
    if (svm_args.what == 2) svm_add_uint(read, words + 16, 1);
    if (svm_args.what == 3) svm_load_uint(uint64_t(8));
    if (svm_args.what == 6) svm_store_uint(write, words - 4, 1);
}
