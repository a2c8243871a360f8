// environment.h: what a program checks of its machine before it trusts it.
//
// products  Matrix products come from a library whose result has been seen to depend on settings of
//           the machine (fewer threads than asked for, an instruction set). So each run first
//           computes a few whose result is known.
// test      tests/test_environment.sh
#pragma once

// Needs the device; an Error names the product that is wrong.
void check_products();
