// text_shards.h: texts as token shards, for a model whose tokens are byte pairs.
// idea      a text is encoded once, by one process, and kept as NAME.KEY.bin in llm.c's format. The
//           key is a checksum of text and tokenizer: another text or vocabulary has another shard
// place     beside the text; where that cannot be written, in a directory of the caller's, at last
//           in that for temporary files. There another user's shard is taken only if that user owns
//           the text, too
// cost      the shard is made in memory: 2 bytes a token (4 above 65536 tokens)
// test      tests/test_support.cpp, tests/test_formats.sh
#pragma once
#include "inference/tokenizer.h"

// `files` with a shard in the place of every text; no files: those of this project, as one shard.
// say: what to tell those who wait.
std::vector<std::string> token_shards(const std::vector<std::string>& files,
                                      const Tokenizer& tokenizer, const std::string& directory,
                                      const Say& say);
