// test_fuzz.cpp: replays tests/corpus, what libFuzzer found worth keeping (tests/fuzz.sh): none of
// it crashes, hangs, or ends in anything but an Error, and some of each kind is read.
#include "tests/fuzz_targets.h"
#include "tests/test.h"

static void replay(const char* name) {
  size_t count = 0, read = 0;
  for (const fuzz::Target& target : fuzz::kTargets)
    if (std::string(target.name) == name)
      for (const auto& file :
           std::filesystem::directory_iterator(project_root() + "/tests/corpus/" + name)) {
        read += fuzz::run(target, file.file_size() ? read_file(file.path()) : "");
        count++;
      }
  CHECK(read > 0);
  measured(read, " of ", count, " inputs are read");
}

TEST(safetensors_of_the_corpus_are_read_or_refused) { replay("safetensors"); }
TEST(manifests_of_the_corpus_are_read_or_refused) { replay("manifest"); }
TEST(vocabularies_of_the_corpus_are_read_or_refused) { replay("vocabulary"); }
TEST(tokenizer_jsons_of_the_corpus_are_read_or_refused) { replay("tokenizer_json"); }
TEST(shards_of_the_corpus_are_read_or_refused) { replay("shard"); }
TEST(options_of_the_corpus_are_read_or_refused) { replay("options"); }

int main(int argc, char** argv) { return run_tests(argc, argv); }
