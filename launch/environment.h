// environment.h: what a program checks of its machine before it trusts it.
//
// products  Matrix products come from a library whose result has been seen to depend on settings of
//           the machine (fewer threads than asked for, an instruction set). So each run first
//           computes a few whose result is known.
// launch    Ranks that were given other options, other data or another program would train copies
//           that drift apart. So all compare what they have before they talk about anything else.
// test      tests/test_environment.sh
#pragma once
#include "launch/job.h"

// Needs the device; an Error names the product that is wrong.
void check_products();

// Collective: what the ranks were not given alike, by name, with the ranks that have each value; ""
// where all are alike. The program itself is compared, too.
std::string differences(NamedValues given);
