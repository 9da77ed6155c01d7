#version 460
#extension GL_GOOGLE_include_directive : require
#include "hmm_svm.glsl"
// One step of a breadth-first search of a graph of { neighbours, degree, level }: a node without a level that has a neighbour of
// the level before gets this one. It looks at its neighbours, so it changes no node but its own.

SVM_ARGS {
    uint64_t nodes; // pointers to all
    uint64_t reached; // how many got this level, 32 bits
    uint64_t count;
    uint level;
};

void main() {
    if (!svm_begin()) return;
    uint64_t i = svm_invocation();
    if (i >= svm_args.count) return;
    uint64_t node = svm_load_uint64(svm_args.nodes + 8 * i);
    if (svm_missed()) return;
    if (svm_load_uint(node + 12) != ~0u) return;
    uint64_t neighbours = svm_load_uint64(node);
    uint degree = svm_load_uint(node + 8);
    bool found = false;
    for (uint k = 0; k < degree && !found && !svm_missed(); k++) {
        uint64_t neighbour = svm_load_uint64(neighbours + 8 * k);
        if (svm_missed()) break;
        found = svm_load_uint(neighbour + 12) == svm_args.level - 1;
    }
    if (!found || svm_missed()) return;
    SvmSpan mine = svm_write(node + 12, 4), reached = svm_write(svm_args.reached, 4);
    if (!svm_commit()) return;
    svm_store_uint(mine, node + 12, svm_args.level);
    svm_add_uint(reached, svm_args.reached, 1);
}
