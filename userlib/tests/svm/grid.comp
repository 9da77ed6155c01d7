#version 460
#extension GL_GOOGLE_include_directive : require
#define SVM_GROUP 4
#define SVM_GROUP_Y 2
#define SVM_GROUP_Z 3
#include "hmm_svm.glsl"
// Adds to each place of a grid its number, from one on.

SVM_ARGS {
    uint64_t places;
    uint x;
    uint y;
};

void main() {
    if (!svm_begin()) return;
    uvec3 at = svm_global_id();
    uint number = (at.z * svm_args.y + at.y) * svm_args.x + at.x;
    uint64_t place = svm_args.places + 4 * number;
    SvmSpan span = svm_write(place, 4);
    if (!svm_commit()) return;
    svm_add_uint(span, place, number + 1);
}
