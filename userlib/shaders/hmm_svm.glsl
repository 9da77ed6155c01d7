// Shared virtual addressing for compute shaders: loads, stores and atomics by the program's own 64-bit pointers.
//
// A shader says what it will touch, commits, and only then changes anything:
//
//     #version 460
//     #extension GL_GOOGLE_include_directive : require
//     #include "hmm_svm.glsl"
//     SVM_ARGS { uint64_t from; uint64_t to; uint64_t count; };
//
//     void main() {
//         if (!svm_begin()) return;                       // this invocation has nothing to do in this round
//         uint64_t at = 4 * uint64_t(svm_invocation());
//         if (at >= 4 * svm_args.count) return;
//         SvmSpan to = svm_write(svm_args.to + at, 4);
//         float value = svm_load_float(svm_args.from + at);
//         if (!svm_commit()) return;                      // something was not there: this runs again, from the beginning
//         svm_store_float(to, svm_args.to + at, 2 * value);
//     }
//
// Between begin and commit anything may miss. What is loaded then is zero, so that chains and trees end by themselves; a loop
// that does not end at zero asks svm_missed(). After commit nothing can miss: stores and atomics take a span that was
// translated before, and are refused (the dispatch fails with what was done wrong) before commit, and outside of their span. An
// invocation that has committed is never run again, so what it does is done exactly once.
//
// A group has SVM_GROUP invocations (64), times SVM_GROUP_Y and SVM_GROUP_Z (1): define them before the include for others.
// Values lie at multiples of their size. Every path from begin leads to commit or returns. `svm_invocation()`, `svm_group()` and
// `svm_global_id()` stand for Vulkan's own, which count what is dispatched in this round only. A barrier() cannot be used: not
// all invocations of a group run in every round.

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#ifdef SVM_ATOMIC64
#extension GL_EXT_shader_atomic_int64 : require
#endif

#ifndef SVM_GROUP
#define SVM_GROUP 64
#endif
#ifndef SVM_GROUP_Y
#define SVM_GROUP_Y 1
#endif
#ifndef SVM_GROUP_Z
#define SVM_GROUP_Z 1
#endif
layout(local_size_x = SVM_GROUP, local_size_y = SVM_GROUP_Y, local_size_z = SVM_GROUP_Z) in;

// How an address is translated. The host says when it makes the pipeline.
layout(constant_id = 0) const uint SVM_MODE = 0;
const uint SVM_RAW = 0;    // not at all: the device shares the processes' page tables
const uint SVM_RANGES = 1; // by a sorted list of ranges, each of which is somewhere else for the device
const uint SVM_TABLE = 2;  // by the driver's device page table

// What a fault wants, and why it is one.
const uint SVM_FAULT_WRITE = 1;
const uint SVM_FAULT_SYSTEM = 2; // the table has it in system memory, where it does not lead

// What was done wrong.
const uint SVM_MISUSE_EARLY = 1;   // a store or an atomic before commit
const uint SVM_MISUSE_OUTSIDE = 2; // one that is not wholly inside its span
const uint SVM_MISUSE_READ = 4;    // one to a span that is for reading
const uint SVM_MISUSE_LATE = 8;    // a translation after commit
const uint SVM_MISUSE_LONG = 16;   // a span of more than 4096 bytes

layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer SvmControl {
    uint64_t root;      // the table's root, or the list of ranges
    uint64_t base;      // where the device has offset 0 of the VRAM
    uint64_t missed;    // a word an invocation: 0, 1 it has to run again, 2 and it has saved something
    uint64_t saved;     // two 64-bit words an invocation
    uint64_t list;      // the groups of a replay
    uint64_t outcome;
    uint64_t nowhere;   // a page of zeroes: what is read where nothing is
    uint levels;        // of the table; how many ranges there are
    uint capacity;      // faults that there is room for
    uint groups_x;
    uint groups_y;
    uint64_t filter_;   // 8192 words: what was noted last, of pages that have this place
    uint64_t twins;     // a list of ranges too: pages that kernels have copies of, whatever the table says
    uint twin_ranges;
    uint unused;
};

struct SvmFault {
    uint64_t addr;
    uint wants;
    uint unused;
};

layout(buffer_reference, std430, buffer_reference_align = 16) buffer SvmOutcome {
    uint faults;
    uint missed;
    uint advanced;
    uint misuse;
    SvmFault list[];
};

layout(push_constant, std430) uniform SvmPush {
    uint64_t control;
    uint64_t args;
    uint first;  // the first group of this dispatch, or its place in the list
    uint replay; // whether groups come from the list, and only what has missed is to run
    uint lane;   // of each group, the first invocation that runs, and how many do
    uint lanes;
    uint loud;   // whether to report what was requested before
    uint zero;   // 0, which the compiler does not know
} svm_push;

#define SVM_ARGS layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer SvmArgs
#define svm_args SvmArgs(svm_args_)

// Read where all invocations run. Mesa's processor driver makes a load whose address is the same in all of them even where none is active,
// as at the end of a loop, and then by what the first of them has: nothing, if it did not run when the address was read.
uint64_t svm_args_ = svm_push.args;

layout(buffer_reference, std430, buffer_reference_align = 4) buffer SvmWord { uint value; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer SvmLong { uint64_t value; };
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer SvmRange { uint64_t begin; uint64_t end; uint64_t delta; uint64_t write; };

uint svm_group_ = 0, svm_invocation_ = 0;
bool svm_missed_ = false, svm_blind_ = false, svm_committed_ = false;
// What the last translation said: addresses from this one on, so many, are further on by delta.
uint64_t svm_last_ = 0, svm_last_bytes_ = 0, svm_delta_ = 0;
#ifdef SVM_SAVES
// That it is there tells the host to make room.
layout(constant_id = 1) const uint SVM_SAVED_WORDS = 2;
bool svm_saves_ = false;
uint64_t svm_saved_0_ = 0, svm_saved_1_ = 0, svm_before_0_ = 0, svm_before_1_ = 0;
#endif

// Zero, but not known to be, nor to be the same in all invocations: Mesa 26.1's processor driver makes a load whose address is the
// same in all of them even where none is active, and then from wherever it leads: what a loop computes is nothing then.
uint64_t svm_zero_() { return uint64_t(svm_push.zero * gl_LocalInvocationIndex); }

uint svm_group() { return svm_group_; }
uint svm_invocation() { return svm_invocation_; }
bool svm_missed() { return svm_missed_; }

uvec3 svm_group_id() {
    SvmControl control = SvmControl(svm_push.control);
    uint row = svm_group_ / control.groups_x;
    return uvec3(svm_group_ % control.groups_x, row % control.groups_y, row / control.groups_y);
}

uvec3 svm_global_id() { return svm_group_id() * gl_WorkGroupSize + gl_LocalInvocationID; }

SvmOutcome svm_outcome_() { return SvmOutcome(SvmControl(svm_push.control).outcome); }

void svm_misuse_(uint what) { atomicOr(svm_outcome_().misuse, what); }

SvmWord svm_state_() { return SvmWord(SvmControl(svm_push.control).missed + 4 * uint64_t(svm_invocation_)); }

// Whether this invocation is to run.
bool svm_begin() {
    SvmControl control = SvmControl(svm_push.control);
    svm_group_ = svm_push.first + gl_WorkGroupID.x;
    bool again = svm_push.replay != 0;
    uint listed = SvmWord(control.list + (again ? 4 * uint64_t(svm_group_) : 0)).value;
    if (again) svm_group_ = listed;
    svm_invocation_ = svm_group_ * (SVM_GROUP * SVM_GROUP_Y * SVM_GROUP_Z) + gl_LocalInvocationIndex;
    if (gl_LocalInvocationIndex - svm_push.lane >= svm_push.lanes) return false;
    if (svm_push.replay != 0) {
        uint state = svm_state_().value;
        if (state == 0) return false;
        svm_state_().value = 0;
#ifdef SVM_SAVES
        if (state == 2) {
            uint64_t saved = control.saved + 16 * uint64_t(svm_invocation_);
            svm_saves_ = true;
            svm_before_0_ = SvmLong(saved).value;
            svm_before_1_ = SvmLong(saved + 8).value;
        }
#endif
    }
    return true;
}

// Whether all that was asked for is there. From then on the invocation may store, and does not run again.
bool svm_commit() {
#ifdef SVM_SAVES
    if (svm_missed_ && svm_saves_) {
        uint64_t saved = SvmControl(svm_push.control).saved + 16 * uint64_t(svm_invocation_);
        if (svm_saved_0_ != svm_before_0_ || svm_saved_1_ != svm_before_1_) svm_outcome_().advanced = 1;
        SvmLong(saved).value = svm_saved_0_;
        SvmLong(saved + 8).value = svm_saved_1_;
        svm_state_().value = 2;
    }
#endif
    if (svm_missed_) return false;
    svm_committed_ = true;
    return true;
}

#ifdef SVM_SAVES
// Gives what the last round saved, if it did: a walk need not begin anew at every miss.
bool svm_restore(out uint64_t a, out uint64_t b) {
    a = svm_saved_0_ = svm_before_0_;
    b = svm_saved_1_ = svm_before_1_;
    return svm_saves_;
}

// Keeps two words for the next round, if there is one.
void svm_save(uint64_t a, uint64_t b) {
    svm_saves_ = true;
    svm_saved_0_ = a;
    svm_saved_1_ = b;
}
#endif

// Notes a miss, and that this invocation has to run again. `entry` is where the table's leaf has the page, or zero.
void svm_miss_(uint64_t addr, uint wants, uint64_t entry, bool marked) {
    svm_missed_ = true;
    if (SVM_MODE != SVM_RAW) svm_state_().value = 1;
    SvmOutcome outcome = svm_outcome_();
    outcome.missed = 1;
    if (svm_committed_) svm_misuse_(SVM_MISUSE_LATE);
    // What was loaded after a miss leads nowhere. What somebody else has asked for need not be asked for again.
    if (svm_blind_ || (marked && svm_push.loud == 0)) return;
    if (SVM_MODE == SVM_TABLE) {
        // A page that many want is noted once, or a few times, also where the table has no place for a mark yet. Not zero, whatever the
        // address: that is a place where nothing was noted.
        uint key = uint(addr >> 12) * 4 + 2 + (wants & SVM_FAULT_WRITE);
        uint64_t last = SvmControl(svm_push.control).filter_ + 4 * uint64_t((key * 0x9e3779b1u) >> 19);
        if (atomicExchange(SvmWord(last).value, key) == key) return;
    }
    uint place = atomicAdd(outcome.faults, 1);
    if (place >= SvmControl(svm_push.control).capacity) return;
    outcome.list[place] = SvmFault(addr, wants, 0);
    if (entry != 0) atomicOr(SvmWord(entry).value, 8);
}

// Looks an address up in a list of ranges, which has one that begins at 0: the last that does not begin behind it.
bool svm_look_up_(uint64_t list, uint count, uint64_t addr, bool write) {
    uint low = 0, high = count;
    while (high - low > 1) {
        uint middle = (low + high) / 2;
        if (SvmRange(list + 32 * uint64_t(middle)).begin <= addr) low = middle; else high = middle;
    }
    SvmRange range = SvmRange(list + 32 * uint64_t(low));
    svm_last_ = range.begin;
    svm_last_bytes_ = range.end - range.begin;
    svm_delta_ = range.delta + svm_zero_();
    return addr < range.end && (!write || range.write != 0);
}

// Translates, and remembers what it found in svm_last_, svm_last_bytes_ and svm_delta_.
void svm_find_(uint64_t addr, bool write) {
    addr += svm_zero_();
    SvmControl control = SvmControl(svm_push.control);
    uint wants = write ? SVM_FAULT_WRITE : 0;
    bool found;
    if (SVM_MODE == SVM_RAW) {
        found = addr >= 4096;
        svm_last_ = 4096;
        svm_last_bytes_ = ~uint64_t(4095);
        svm_delta_ = svm_zero_();
        if (!found) svm_miss_(addr, wants, 0, false);
    } else if (SVM_MODE == SVM_RANGES) {
        found = svm_look_up_(control.root, control.levels, addr, write);
        if (!found) svm_miss_(addr, wants, 0, false);
    } else if (control.twin_ranges != 0 && svm_look_up_(control.twins, control.twin_ranges, addr, write)) {
        found = true;
    } else {
        uint levels = control.levels;
        uint64_t node = control.root, base = control.base, nowhere = control.nowhere;
        uint64_t at = 0, word = 0;
        bool there = (addr >> (12 + 9 * levels)) == 0;
        // Without a branch: what is not there leads to the page of zeroes, and every load has an address.
        for (uint level = levels; level-- > 0;) {
            at = node + 8 * ((addr >> (12 + 9 * level)) & 511);
            word = SvmLong(at).value;
            bool valid = (word & 1) != 0;
            there = there && (valid || level == 0);
            node = valid ? base + (word & 0x000ffffffffff000UL) : nowhere;
        }
        uint want = write ? 7 : 5;
        found = there && (uint(word) & want) == (write ? 3 : 1);
        svm_last_ = addr & ~uint64_t(4095);
        svm_last_bytes_ = 4096;
        svm_delta_ = node - svm_last_;
        if (!found) {
            bool valid = there && (word & 1) != 0;
            if (valid && (word & 4) != 0) wants |= SVM_FAULT_SYSTEM;
            svm_miss_(addr, wants, there && !valid ? at : 0, there && !valid && (word & 8) != 0);
        }
    }
    if (!found) {
        svm_last_ = addr & ~uint64_t(4095);
        svm_last_bytes_ = 0;
        svm_delta_ = control.nowhere - svm_last_;
    }
}

// Up to 4096 bytes that were translated at once: what is before `split` is further on by `low`, the rest by `high`.
struct SvmSpan {
    uint64_t begin;
    uint64_t split;
    uint64_t low;
    uint64_t high;
    uint bytes;
    bool write;
};

SvmSpan svm_span_(uint64_t addr, uint bytes, bool write) {
    SvmSpan span = SvmSpan(addr, ~uint64_t(0), 0, 0, bytes, write);
    if (bytes > 4096) svm_misuse_(SVM_MISUSE_LONG);
    uint64_t last = addr + max(bytes, 1) - 1;
    svm_find_(addr, write);
    span.low = svm_delta_;
    span.high = svm_delta_;
    // Pages and ranges that follow one another need not do so for the device.
    uint64_t end = SVM_MODE == SVM_TABLE ? (addr | 4095) + 1 : svm_last_ + svm_last_bytes_;
    bool more = last >= end && (SVM_MODE == SVM_TABLE || svm_last_bytes_ != 0);
    if (SVM_MODE != SVM_RAW && more) {
        span.split = end;
        svm_find_(end, write);
        span.high = svm_delta_;
        bool short_ = svm_last_bytes_ != 0 && last - svm_last_ >= svm_last_bytes_;
        if (SVM_MODE == SVM_RANGES && short_) svm_miss_(last, write ? SVM_FAULT_WRITE : 0, 0, false);
    }
    // The next load by a mere address must not take a translation for it that was of another kind.
    svm_last_bytes_ = 0;
    return span;
}

// What will be read; what will be changed (and may be read). At most 4096 bytes.
SvmSpan svm_read(uint64_t addr, uint bytes) { return svm_span_(addr, bytes, false); }
SvmSpan svm_write(uint64_t addr, uint bytes) { return svm_span_(addr, bytes, true); }

uint64_t svm_in_(SvmSpan span, uint64_t addr) {
    svm_blind_ = svm_missed_;
    return addr + (addr < span.split ? span.low : span.high);
}

// Whether a span may be changed there, now.
bool svm_may_(SvmSpan span, uint64_t addr, uint bytes) {
    if (svm_committed_ && span.write && span.bytes >= bytes && addr - span.begin <= span.bytes - bytes) return true;
    svm_misuse_(!svm_committed_ ? SVM_MISUSE_EARLY : !span.write ? SVM_MISUSE_READ : SVM_MISUSE_OUTSIDE);
    return false;
}

uint64_t svm_at_(uint64_t addr) {
    if (addr - svm_last_ >= svm_last_bytes_) svm_find_(addr, false);
    // Of an address whose page is not there, the place in the page.
    uint64_t at = svm_last_bytes_ == 0 ? addr & 4095 : addr;
    svm_blind_ = svm_missed_;
    return svm_last_bytes_ == 0 ? SvmControl(svm_push.control).nowhere + at + svm_zero_() : addr + svm_delta_;
}

#define SVM_VALUE(T, NAME, BYTES) \
    layout(buffer_reference, std430, buffer_reference_align = BYTES) buffer SvmAt_##NAME { T value; }; \
    T svm_load_##NAME(uint64_t addr) { return SvmAt_##NAME(svm_at_(addr)).value; } \
    T svm_load_##NAME(SvmSpan span, uint64_t addr) { return SvmAt_##NAME(svm_in_(span, addr)).value; } \
    void svm_store_##NAME(SvmSpan span, uint64_t addr, T value) { \
        if (svm_may_(span, addr, BYTES)) SvmAt_##NAME(svm_in_(span, addr)).value = value; \
    }

SVM_VALUE(float, float, 4)
SVM_VALUE(int, int, 4)
SVM_VALUE(uint, uint, 4)
SVM_VALUE(int64_t, int64, 8)
SVM_VALUE(uint64_t, uint64, 8)
SVM_VALUE(vec2, vec2, 8)
SVM_VALUE(vec4, vec4, 16)
SVM_VALUE(uvec2, uvec2, 8)
SVM_VALUE(uvec4, uvec4, 16)

#define SVM_ATOMIC(T, NAME, BYTES, DO, OP) \
    T svm_##DO##_##NAME(SvmSpan span, uint64_t addr, T operand) { \
        if (!svm_may_(span, addr, BYTES)) return T(0); \
        return OP(SvmAt_##NAME(svm_in_(span, addr)).value, operand); \
    }

#define SVM_ATOMICS(T, NAME, BYTES) \
    SVM_ATOMIC(T, NAME, BYTES, add, atomicAdd) \
    SVM_ATOMIC(T, NAME, BYTES, min, atomicMin) \
    SVM_ATOMIC(T, NAME, BYTES, max, atomicMax) \
    SVM_ATOMIC(T, NAME, BYTES, and, atomicAnd) \
    SVM_ATOMIC(T, NAME, BYTES, or, atomicOr) \
    SVM_ATOMIC(T, NAME, BYTES, xor, atomicXor) \
    SVM_ATOMIC(T, NAME, BYTES, exchange, atomicExchange) \
    T svm_compare_##NAME(SvmSpan span, uint64_t addr, T expected, T value) { \
        if (!svm_may_(span, addr, BYTES)) return T(0); \
        return atomicCompSwap(SvmAt_##NAME(svm_in_(span, addr)).value, expected, value); \
    }

SVM_ATOMICS(int, int, 4)
SVM_ATOMICS(uint, uint, 4)
#ifdef SVM_ATOMIC64
SVM_ATOMICS(int64_t, int64, 8)
SVM_ATOMICS(uint64_t, uint64, 8)
#endif
