#version 460
#extension GL_GOOGLE_include_directive : require
#define SVM_GROUP 4
#include "hmm_svm.glsl"
// Has word n of its pages be `early` + n, says that it has begun, goes on until it is told to stop, and has the words be `late` + n.
// What it says and is told is not translated: it lies where the program has it, for a device that shares page tables with that (lavapipe).

SVM_ARGS {
    uint64_t pages; // four for each invocation
    uint64_t talk;
    uint early;
    uint late;
};

layout(buffer_reference, std430, buffer_reference_align = 4) buffer Talk { uint begun; uint stop; };

SvmSpan spans[4];

void fill(uint64_t at, uint value) {
    for (uint page = 0; page < 4; page++) {
        for (uint word = 0; word < 1024; word += 4) {
            uint64_t place = at + 4096 * page + 4 * word;
            uint first = value + uint((place - svm_args.pages) / 4);
            svm_store_uvec4(spans[page], place, uvec4(first, first + 1, first + 2, first + 3));
        }
    }
}

void main() {
    if (!svm_begin()) return;
    uint64_t at = svm_args.pages + 4 * 4096 * uint64_t(svm_invocation());
    for (uint page = 0; page < 4; page++) spans[page] = svm_write(at + 4096 * page, 4096);
    if (!svm_commit()) return;
    fill(at, svm_args.early);
    // By atomic operations, which are done each time, and by nobody who is not to run.
    Talk talk = Talk(svm_args.talk + svm_zero_());
    atomicAdd(talk.begun, 1);
    while (atomicOr(talk.stop, 0) == 0) {}
    fill(at, svm_args.late);
}
