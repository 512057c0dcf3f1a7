// Compile what follows for an instruction set that the build's flags don't name.
//
// Inline functions of system headers must not be compiled in such a part: the linker could take
// their copies for the whole library. Include them before PF_TARGET_BEGIN.
#pragma once

#define PF_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PF_TARGET_BEGIN(isa) \
    PF_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PF_TARGET_END PF_PRAGMA(clang attribute pop)
#else
#define PF_TARGET_BEGIN(isa) PF_PRAGMA(GCC push_options) PF_PRAGMA(GCC target(isa))
#define PF_TARGET_END PF_PRAGMA(GCC pop_options)
#endif
